"""A log for inspect_ai. What it reads is checked by hand with its own models, which bring 55 packages."""

import json

from test_compare import boxed, result

from jaxdistill.evaluate.inspect_log import document


def test_a_log_holds_each_sample_with_its_score():
    found = document(result("before", [boxed(1, 2), boxed(0, 2)], "12"))
    json.dumps(found, ensure_ascii=False).encode()  # test_compare's problems hold half an emoji
    assert (found["version"], found["status"]) == (2, "success")
    assert found["results"]["scores"][0]["metrics"]["accuracy"] == {"name": "accuracy", "value": 0.5}
    assert [(s["id"], s["epoch"], s["scores"]["boxed_math"]["value"]) for s in found["samples"]] == [
        ("p0", 1, 1.0),
        ("p0", 2, 0.0),
        ("p1", 1, 0.0),
        ("p1", 2, 1.0),
    ]
    first = found["samples"][0]
    assert first["target"] == first["scores"]["boxed_math"]["answer"] == "1"
    assert first["output"]["choices"][0]["stop_reason"] == "stop"
    assert first["output"]["usage"]["reasoning_tokens"] == 10
    assert first["messages"][-1]["content"] == [
        {"type": "reasoning", "reasoning": "I think."},
        {"type": "text", "text": r"\boxed{1}"},
    ]
