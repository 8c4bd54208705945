"""Where an answer came from: what was attended to, which experts worked, what else was likely (`mm explain`)."""
