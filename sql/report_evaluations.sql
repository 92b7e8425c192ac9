-- What did each intervention erase, and what did it spare?
-- in: evaluations      out: its rows, evaluation by evaluation; accuracies with their 95 % interval (Wilson 1927)
select table_id, action, factor, "value", layers, edit_tau, edit_top_fraction, n_texts, concept, condition,
    target_accuracy, target_accuracy_low, target_accuracy_high, target_confidence,
    complement_accuracy, complement_accuracy_low, complement_accuracy_high, complement_confidence,
    n_target, n_complement, perplexity, tested, changed
from evaluations
order by table_id, action, factor, "value", layers, edit_tau, edit_top_fraction, n_texts, concept,
    array_position(['base', 'neuron', 'range'], condition);
