"""Writing and reading model directories."""
