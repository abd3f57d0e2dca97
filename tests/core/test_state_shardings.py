"""Where the state of an optimizer lies, by the parameters. Runs itself again on 8 virtual devices if need be."""
