"""Kernel score models from Wasserstein proximal operators.

The package of the book of the same name, after B. J. Zhang, S. Liu, W. Li, M. A. Katsoulakis and
S. J. Osher, "Wasserstein proximal operators describe score-based generative models and resolve
memorization", arXiv:2402.06162 (2024). "Eq. (n)" in a docstring is that paper's equation (n).
"""

__version__ = "0.2.0"
