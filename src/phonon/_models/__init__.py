"""What is behind `phonon.Model` and `phonon.fields`: types, orders, states, and generated code."""
