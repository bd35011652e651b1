from rewriter.replay.buckets import bucket, fine_bucket


def test_a_bucket_holds_the_length_and_wastes_at_most_an_eighth_or_63_tokens():
    for length in range(1, 9000):
        found = bucket(length)
        assert length <= found <= max(length + 63, length * 9 / 8)


def test_longer_lengths_have_no_shorter_buckets_and_few_buckets_serve_all():
    found = [bucket(length) for length in range(1, 4097)]
    assert found == sorted(found)
    assert len(set(found)) == 32


def test_a_bucket_is_its_own_bucket():
    assert all(bucket(bucket(length)) == bucket(length) for length in range(1, 9000))


def test_fine_buckets_waste_less_than_a_thirty_second():
    for length in range(256, 9000):
        assert length <= fine_bucket(length) < length * 33 / 32
    assert [fine_bucket(n) for n in (1, 100, 2048, 4096)] == [8, 104, 2048, 4096]
    assert len({fine_bucket(n) for n in range(2049, 4097)}) == 32
