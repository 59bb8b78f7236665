"""What the tools share: input files and their errors, output files, tables and progress, plots, ranks."""
