"""This library in the slots of others; each module imports what it is named after."""
