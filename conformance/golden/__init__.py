"""Results of one attention step that the original implementation recorded, see README.md beside this file."""
