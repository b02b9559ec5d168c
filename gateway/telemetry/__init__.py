"""What the node tells its operators: metrics and log."""
