"""What can be relied on: every promise of `make faults`, in its short form.

The parts are in fault_runs.py, fault_files.py and fault_limits.py; what they rest on is tested in
the files named after these.
"""

import faults
import pytest


@pytest.fixture(scope="module")
def held(ucf101, oops, kinetics400, charades, tmp_path_factory):
    """From a part to the figures of its promises, all of which must hold."""
    root = tmp_path_factory.mktemp("faults")
    (root / "data").mkdir()
    for folder in (ucf101, oops, kinetics400, charades):      # of all tests; else made anew
        (root / "data" / folder.name).symlink_to(folder)

    def figures(part, seed=0):                                # `make faults` takes other seeds
        (root / part).mkdir()
        rows = list(faults.PARTS[part](root / part, seed, False))
        broken = [f"{row.promise}: {f}" for row in rows for f in row.failed]
        assert not broken, "\n".join(broken[:5])
        return [row.figures for row in rows]
    return figures


def test_runs_killed_at_any_moment_end_in_the_same_bytes(held):
    rows = held("kill")                                       # `make faults`: 20 of each script
    assert len(rows) == 4
    assert all(row["kills"] >= 10 and row["in_preparation"] >= 1 for row in rows), rows
    assert sum(row["in_checkpoints"] for row in rows) >= 2


def test_sigterm_stops_all_processes_at_one_step_with_its_checkpoint(held):
    rows = held("sigterm", 1)
    assert len(rows) == 4 and all(row["stopped"] >= 2 for row in rows), rows


def test_torchrun_of_two_agents_a_killed_worker_and_one_that_fails(held):
    equal, failing, killed = held("torchrun")
    assert list(equal) == ["seconds"] and list(killed) == ["killed", "worst_recovery_s"]
    assert 0 < failing["worst_s"] < 60 and failing["cases"] == 2


def test_damaged_and_unusual_media_files_are_read_right_or_refused(held):
    damaged, folders, unusual, opens = held("media")
    assert damaged["files"] >= 300 + 30 and damaged["worst_s"] < 30
    assert min(damaged["read"], damaged["refused"]) > 500
    assert folders["folders"] >= 30 and unusual["files"] >= 30
    assert opens["opens"] >= 2000 and opens["megabytes"] < 20
    assert opens["descriptors"] <= 0 and opens["threads"] <= 0


def test_mutated_annotations_are_read_right_or_refused_in_one_line(held):
    row, = held("annotations")
    assert row["forms"] >= 35 and row["mutations"] >= 3000
    assert min(row[k] for k in ("read", "read_otherwise", "refused")) >= 300


def test_hostile_files_run_nothing_and_leave_no_folder(held):
    code, strange, names, written = held("hostile")
    assert code["reads"] >= 200 and strange["files"] >= 40 and written["files"] >= 6
    assert min(names["read"], names["refused"]) >= 300


def test_a_full_disk_costs_one_line_and_no_more(held):
    refused, again, two, stdout = held("disk")
    assert refused["stages"] == 8 and refused["operations refused"] > 150
    assert refused["of them inside FFmpeg"] >= 10 and refused["worst seconds"] < 60
    assert again["runs refused and continued"] == 4 and two["worst seconds"] < 60
    assert stdout["runs"] == 4


def test_nan_and_inf_stop_before_the_update_and_keep_the_checkpoint(held):
    stopped, huge, again = held("numbers")
    assert stopped["loops"] == 11 and stopped["runs"] == 37 and stopped["worst seconds"] < 60
    assert huge["runs"] == 4 and huge["stopped"] >= 2 and again["runs"] == 2


def test_every_number_of_processes_predicts_every_item_once_and_alike(held):
    row, = held("equality")
    assert row["stages"] == 18 and row["cases"] == 62
    assert row["items predicted"] > 350 and row["files compared"] > 150
