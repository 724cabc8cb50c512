//! Guests that write faster than pages travel.

use super::*;

/// A guest that writes flat out, and 50 ms in which 32 of its 64 pages can be sent.
fn flat_out(convergence: Convergence) -> (Shared, SourcePlan) {
    let world = World::new(Fault { flat_out: true, ..Fault::default() });
    let convergence = Convergence { downtime_limit: Duration::from_millis(50), ..convergence };
    (world, SourcePlan { convergence, ..plan(None, false) })
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_writes_flat_out_is_throttled_and_freed() {
    let (world, plan) = flat_out(Convergence { auto_converge: true, ..plan(None, false).convergence });
    let fault = world.lock().unwrap().fault;
    let report = run(&world, plan).await;
    assert_eq!(report.status, Status::Completed, "{:?}", report.error_desc);
    assert_sound(&report, &world, fault);
    assert_eq!(world.lock().unwrap().throttles[0], 20, "gently first");
    assert_eq!((report.throttle.as_deref(), report.cpu_throttle_percentage), (Some("memory"), 0));
    let estimates: Vec<_> = report.rounds.iter().filter_map(|round| round.estimate).collect();
    assert!(estimates.last().unwrap().downtime_at_most <= 50.0, "{estimates:?}");
    assert!(estimates.iter().any(|estimate| estimate.cpu_throttle_percentage >= 20));
    assert!(report.expected_downtime.is_some() && report.prediction_error.is_some());
}

#[tokio::test(start_paused = true)]
async fn whatever_fails_while_it_is_throttled_frees_it() {
    for nth in 3..9 {
        for call in [Call::TakeWritten, Call::Send, Call::CloseRound, Call::Throttle] {
            let (world, plan) =
                flat_out(Convergence { auto_converge: true, ..plan(None, false).convergence });
            let fault = Fault {
                call: Some((call, nth - 3 * usize::from(call == Call::Throttle))),
                flat_out: true,
                ..Fault::default()
            };
            world.lock().unwrap().fault = fault;
            let report = run(&world, plan).await;
            assert_sound(&report, &world, fault);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_that_cannot_throttle_says_so_and_goes_on_without() {
    let (world, plan) = flat_out(Convergence { auto_converge: true, ..plan(None, false).convergence });
    let fault = Fault { call: Some((Call::Throttle, 0)), flat_out: true, ..Fault::default() };
    world.lock().unwrap().fault = fault;
    let report = run(&world, plan).await;
    assert!(report.error_desc.as_ref().unwrap().contains("does not converge"), "{:?}", report.error_desc);
    assert!(report.notes.iter().any(|note| note.contains("not throttled: ")), "{:?}", report.notes);
    assert_eq!(world.lock().unwrap().throttles, [20, 0], "what was half done is undone, and not tried again");
    assert_sound(&report, &world, fault);
}

#[tokio::test(start_paused = true)]
async fn when_the_time_is_up_the_plan_says_what_happens() {
    for (action, expected) in [
        (TimeoutAction::Cancel, Status::Failed),
        (TimeoutAction::Switchover, Status::Completed),
        (TimeoutAction::Throttle, Status::Completed),
    ] {
        let timeout = Some(Duration::from_secs(2));
        let (world, plan) =
            flat_out(Convergence { timeout, timeout_action: action, ..plan(None, false).convergence });
        let fault = world.lock().unwrap().fault;
        let begun = tokio::time::Instant::now();
        let report = run(&world, plan).await;
        assert_eq!(report.status, expected, "{action:?}: {:?}", report.error_desc);
        assert!(begun.elapsed() >= Duration::from_secs(2), "{action:?}");
        assert_eq!(!world.lock().unwrap().throttles.is_empty(), action == TimeoutAction::Throttle);
        if expected == Status::Failed {
            assert!(report.error_desc.as_ref().unwrap().contains("--timeout"));
        }
        assert_sound(&report, &world, fault);
    }
}

#[tokio::test(start_paused = true)]
async fn scans_that_stop_the_vm_are_counted_and_bounded() {
    let (report, world) = migrate(Fault::default(), None, true).await;
    let pauses = world.lock().unwrap().calls.iter().filter(|&&call| call == Call::Pause).count() as u64;
    assert_eq!(report.stuns.count, pauses);
    assert!(pauses > 0 && report.stuns.longest <= report.stuns.total);
    let live = migrate(Fault::default(), None, false).await.0;
    assert_eq!(live.stuns.count, 0);
}
