"""What people read in a browser: reports as single HTML files, from templates, with charts inside."""
