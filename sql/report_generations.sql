-- What does the model still write of each concept without its neurons or ranges, and what of the other concepts?
-- in: generations
-- out: its rows, evaluation by evaluation; the means over concepts (concept NULL) after each evaluation's concepts.
--     Probabilities, drops and selectivity with the 95 % interval of a paired bootstrap, shares with Wilson's (1927).
select *
from generations
order by table_id, action, factor, "value", layers, hook_points, edit_tau, edit_top_fraction, classifier, n_prompts, max_tokens,
    generation_id, concept nulls last, array_position(['base', 'neuron', 'range'], condition);
