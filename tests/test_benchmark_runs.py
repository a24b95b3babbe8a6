"""Data sets of the papers: what it costs to list them."""

import tracemalloc

import pytest

import data


@pytest.mark.slow
def test_listing_takes_few_bytes_for_each_file(tmp_path):
    """DomainNet's 586,575 images take 30 MB: names are kept in blocks, and labels are small numbers."""
    for domain in ("clipart", "real"):
        for kind, count in {"axe": 1100, "bat": 900, "cat": 1000, "dog": 1000}.items():
            (tmp_path / domain / kind).mkdir(parents=True)
            for k in range(count):
                (tmp_path / domain / kind / f"{domain}_{kind}_{k:06d}.jpg").touch()
    data.open_dataset(tmp_path)
    tracemalloc.start()
    dataset = data.open_dataset(tmp_path)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == len(dataset.labels) == 8000
    # a name has 22 letters, a label and a domain take 8 bytes each; one folder is read at a time
    assert size / 8000 < 50 and peak / 8000 < 150
    # rows are blocks of 1,000 images
    names = {0: "clipart/axe/clipart_axe_000000.jpg", 999: "clipart/axe/clipart_axe_000999.jpg"}
    names |= {1000: "clipart/axe/clipart_axe_001000.jpg", 1099: "clipart/axe/clipart_axe_001099.jpg"}
    names |= {1100: "clipart/bat/clipart_bat_000000.jpg", 7999: "real/dog/real_dog_000999.jpg"}
    assert {i: dataset.files[i] for i in names} == names and dataset.files[-1] == names[7999]
    with pytest.raises(IndexError):
        dataset.files[8000]
