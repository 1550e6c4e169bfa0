"""Tools above the think loop: where to split a model, how deep its tokens thought."""
