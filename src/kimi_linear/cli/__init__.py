"""The command line: one file a command. A command reads its options, calls a recipe and prints."""
