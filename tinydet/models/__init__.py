"""The wiring of the papers' nets, one file per paper."""
