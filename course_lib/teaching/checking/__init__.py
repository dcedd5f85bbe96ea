"""Exercises and how an answer is judged: cases, diagnostics, wrong answers, counted work, guarded calls. Knows no notebook."""
