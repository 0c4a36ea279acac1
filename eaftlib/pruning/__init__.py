"""From what every expert did to the experts that stay, and to a checkpoint of those."""
