"""The command line: parser.py has every option, and each other module carries out one command."""
