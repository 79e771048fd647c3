"""The command line: one file for each family of commands; options in, words and JSON out, no logic."""
