"""Figure 3: densities of the models whose samples Figure 2 shows.

Chapter: *Figures 3 and 4: densities* (``book/figures-3-4.md``).
"""

from __future__ import annotations

from wpo_notes.experiments.figure2 import kernel_cases as cases

__all__ = ["cases"]
