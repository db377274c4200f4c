"""What several methods share: the protocol, the source's images, recipes for what they make."""
