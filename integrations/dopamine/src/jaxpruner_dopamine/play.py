"""Shows a trained agent at play: an animated GIF, or a PNG with a strip of frames.

    python -m jaxpruner_dopamine.play --base_dir=runs/cartpole --output=cartpole.gif \
        --gin_files=jaxpruner_dopamine/configs/dqn_cartpole.gin

Give the gin files and bindings of the training. The agent of the latest checkpoint plays as in evaluation; with
`--compact`, the agent that `jaxpruner_dopamine.compact` made from it.
"""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

from absl import app, flags, logging
from PIL import Image

from jaxpruner_dopamine import compact, compaction, train

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Those of training, and what to draw."""
    train.define_flags()
    flags.adopt_module_key_flags(train)  # so that --help lists them
    flags.DEFINE_string("output", None, "A .gif (animated) or .png (a strip of frames).", required=True)
    flags.DEFINE_integer("episode", 0, "Which game; another number is another one.", lower_bound=0)
    flags.DEFINE_integer("every", 2, "Of how many steps one frame of the GIF is drawn.", lower_bound=1)
    flags.DEFINE_integer("frames", 8, "Frames in the strip.", lower_bound=1)
    flags.DEFINE_bool("compact", False, "Whether the compact agent of the base directory plays.")
    flags.DEFINE_integer("height", 200, "Height of a frame in pixels.", lower_bound=1)


def draw(path: pathlib.Path, frames: list[Image.Image], every: int, in_strip: int) -> None:
    """Writes a GIF of every `every`-th frame, or a PNG with `in_strip` frames at equal distances."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        shown = frames[::every]
        shown[0].save(path, save_all=True, append_images=shown[1:], duration=40, loop=0, optimize=True)
        return
    count = min(in_strip, len(frames))
    chosen = [frames[round(i * (len(frames) - 1) / max(count - 1, 1))] for i in range(count)]
    width, height = chosen[0].size
    strip = Image.new("RGB", (count * width + (count - 1) * 4, height), "white")
    for i, frame in enumerate(chosen):
        strip.paste(frame, (i * (width + 4), 0))
    strip.save(path, optimize=True)


def _compact_network(agent: Any) -> compaction.CompactNetwork:
    path = compact.file_of(FLAGS.base_dir)
    try:
        return compaction.load(agent, path)
    except FileNotFoundError:
        raise SystemExit(f"--compact: no {path}. Make it first: python -m jaxpruner_dopamine.compact") from None
    except ValueError as error:
        raise SystemExit(f"--compact: {error}") from error


def main(argv: list[str]) -> None:
    """Plays one episode with the latest checkpoint, and draws it."""
    path = pathlib.Path(FLAGS.output)
    if path.suffix not in (".gif", ".png"):
        raise SystemExit(f"--output: {path} is neither a .gif nor a .png.")
    logging.set_verbosity(logging.ERROR)
    runner = compact.restored(argv)
    player: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    told = f"sparsity {runner.agent.sparsity().get('total', 0.0):.4f}"
    if FLAGS.compact:
        network = _compact_network(runner.agent)
        player, told = compaction.acting_with(runner.agent, network), f"compact, {network.small.sizes}"
    frames: list[Image.Image] = []

    def keep(picture: Any) -> None:
        image = Image.fromarray(picture)
        frames.append(image.resize((round(image.width * FLAGS.height / image.height), FLAGS.height)))

    with player:
        total = runner.play(FLAGS.episode, keep)
    draw(path, frames, FLAGS.every, FLAGS.frames)
    print(f"{path}: {len(frames)} steps, return {total:g}, {told}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
