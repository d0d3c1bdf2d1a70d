"""Users that answer back: they browse, talk and learn, played by fixed rules or by a language model."""
