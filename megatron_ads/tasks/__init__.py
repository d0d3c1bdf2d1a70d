"""One module per ads task: prompt, target, strict parser."""
