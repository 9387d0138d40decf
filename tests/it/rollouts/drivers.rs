//! Whoever drives a rollout may die at every step: another goes on, and no step is skipped or made twice.

use serde_json::json;

use super::*;

/// Who drives, as a node sees it.
fn driver(mesh: &Mesh, at: usize, id: &str) -> Option<usize> {
    let view = rollout(mesh, at, id);
    mesh.nodes.iter().position(|node| view["driver"] == node.id)
}

/// Waits until one of these nodes shows the rollout at this step, and says which.
fn wait_step(mesh: &Mesh, nodes: &[usize], id: &str, step: usize) -> usize {
    let mut shows = None;
    wait_for(&format!("{id} is at step {step}"), || {
        shows = nodes.iter().copied().find(|at| rollout(mesh, *at, id)["step"] == step);
        shows.is_some()
    });
    shows.unwrap()
}

fn expected(steps: usize) -> Vec<String> {
    let steps = (0..steps).map(|step| format!(r#"step from {{"step":{step}}}"#));
    std::iter::once("start".to_owned()).chain(steps).collect()
}

fn ends_promoted(mesh: &Mesh, id: &str, steps: usize) {
    wait_status(mesh, &[0, 1, 2], id, "promoted");
    wait_stable(mesh, &[0, 1, 2], "digits-v2");
    wait_committed_but(mesh, "resume", &expected(steps));
    mesh.wait_agreement();
    let histories: Vec<_> = (0..3).map(|at| mesh.history(at)).collect();
    assert!(histories.iter().all(|history| *history == histories[0]), "{histories:?}");
}

/// A node that is killed before its log has this needs all of the others to be let in again, and some of them are killed here.
fn wait_admitted(mesh: &Mesh) {
    for at in 0..3 {
        wait_for("the admission is in the log", || {
            text(&run(mesh, &["log", "dump", &mesh.log_of(at).display().to_string()])).contains(r#""record":"admitted""#)
        });
    }
}

/// Resumed at this step through this node, whatever else holds the slot meanwhile. It may die of it, and then others have seen it move.
fn resume(mesh: &Mesh, by: usize, id: &str, step: usize) {
    let moved = |view: Value| match view["step"].as_u64() {
        Some(at) => at > step as u64 || (at == step as u64 && view["status"] == "running"),
        None => view["status"] == "promoted",
    };
    wait_for("it is resumed", || {
        let answer = mesh.post(by, &format!("/rollouts/{id}/resume"), &json!({}));
        answer.is_some_and(|answer| answer.status == 200) || (0..3).any(|at| moved(rollout(mesh, at, id)))
    });
}

/// Each step stands still, so that the test is never late for it.
fn begin_with_stops(mesh: &Mesh, at: usize, weights: &[f64]) -> String {
    let steps: Vec<_> = weights.iter().map(|weight| json!({"weight_percent": weight, "pause": {"for_ms": null}})).collect();
    let request = json!({
        "routes": {"default": "digits-v2"}, "steps": steps, "bake_ms": 0, "bake_max_ms": 0, "on_inconclusive": "advance",
    });
    begin(mesh, at, &request)
}

#[test]
fn whoever_drives_is_killed_at_every_step_and_the_rollout_is_promoted_all_the_same() {
    const WEIGHTS: [f64; 4] = [10.0, 25.0, 50.0, 100.0];
    let mut mesh = started(&json!({}));
    wait_admitted(&mesh);
    let id = begin_with_stops(&mesh, 0, &WEIGHTS);
    let mut dead = None;
    for step in 0..WEIGHTS.len() {
        let alive: Vec<_> = (0..3).filter(|at| Some(*at) != dead).collect();
        let shows = wait_step(&mesh, &alive, &id, step);
        let drives = driver(&mesh, shows, &id).unwrap();
        assert_ne!(Some(drives), dead, "a dead node drives");
        mesh.kill(drives);
        // Until the last one is back there are too few to decide anything.
        if let Some(back) = dead.replace(drives) {
            mesh.start(back, &[]);
            mesh.wait_node_ready(back);
        }
        let goes_on = (0..3).find(|at| Some(*at) != dead).unwrap();
        wait_step(&mesh, &[goes_on], &id, step);
        resume(&mesh, goes_on, &id, step);
    }
    let alive: Vec<_> = (0..3).filter(|at| Some(*at) != dead).collect();
    wait_status(&mesh, &alive, &id, "promoted");
    mesh.start(dead.unwrap(), &[]);
    mesh.wait_ready();
    ends_promoted(&mesh, &id, WEIGHTS.len());
}

#[test]
fn a_death_at_any_point_of_a_step_neither_skips_it_nor_makes_it_twice() {
    const FAULTS: [&str; 4] = ["kill-before-decision", "kill-after-decision", "kill-before-vote", "kill-after-prepared"];
    let mut mesh = started(&json!({}));
    wait_admitted(&mesh);
    let id = begin_with_stops(&mesh, 1, &[5.0, 10.0, 20.0, 40.0, 100.0]);
    for (step, fault) in FAULTS.into_iter().enumerate() {
        mesh.wait_agreement();
        wait_step(&mesh, &[0], &id, step);
        let drives = driver(&mesh, 0, &id).unwrap();
        let coordinates = fault.ends_with("-decision");
        let armed = if coordinates { drives } else { (drives + 1) % 3 };
        mesh.kill(armed);
        mesh.start(armed, &["--fault", fault]);
        mesh.wait_ready();
        wait_for("the same one drives, as all see it", || (0..3).all(|at| driver(&mesh, at, &id) == Some(drives)));
        // What a node coordinates itself asks nothing of it as a participant, and the other way round.
        let by = if coordinates { (armed + 1) % 3 } else { armed };
        resume(&mesh, by, &id, step);
        wait_for(&format!("{fault} at {}", mesh.nodes[armed].id), || mesh.has_ended(armed).is_some());
        let alive: Vec<_> = (0..3).filter(|at| *at != armed).collect();
        wait_step(&mesh, &alive, &id, step + 1);
        mesh.kill(armed);
        mesh.start(armed, &[]);
        mesh.wait_ready();
    }
    resume(&mesh, 2, &id, FAULTS.len());
    ends_promoted(&mesh, &id, 5);
}
