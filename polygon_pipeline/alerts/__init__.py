"""Words for people who do not look: which there are, and how they are sent."""
