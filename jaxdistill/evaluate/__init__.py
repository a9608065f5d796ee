"""Tasks, grading and statistics: from sampled completions to numbers with intervals."""
