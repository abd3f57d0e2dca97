"""For all tests: no test asserts a time, so Hypothesis sets no deadlines."""

import hypothesis

hypothesis.settings.register_profile("workspace", deadline=None)
hypothesis.settings.load_profile("workspace")
