"""How peers that join get the state of one that is there."""
