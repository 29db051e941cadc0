"""Where other libraries meet this one: a module each, imported by those who have the library."""
