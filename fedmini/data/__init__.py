"""Examples: where they come from, which device holds them, and how the model sees them."""

from fedmini.data.encoder import Encoder, Tokenizer
from fedmini.data.examples import Example
from fedmini.data.population import Population, load_evaluation, load_population
from fedmini.data.sources import SOURCES

__all__ = ["SOURCES", "Encoder", "Example", "Population", "Tokenizer", "load_evaluation", "load_population"]
