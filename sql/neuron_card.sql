-- What does one neuron do under each concept: its range, its shape, its salience, its nearest other concept?
-- in: the macro neuron_card, $hook_point, $layer, $neuron, $tau      out: one row per concept
from neuron_card(layer := $layer, neuron := $neuron, tau := $tau, hook_point := $hook_point);
