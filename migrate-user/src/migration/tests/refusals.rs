//! What is refused, and what is only looked at.

use super::*;

#[tokio::test]
async fn other_versions_are_refused_by_both() {
    let world = World::new(Fault::default());
    let (mut a, mut b) = wire(&world);
    let mut host = Host(Arc::clone(&world));
    a.send(Item::Message(Message::Hello {
        protocol: 99,
        software: "x".into(),
        name: "x".into(),
        clock: None,
    }))
    .await
    .unwrap();
    let error =
        DestinationMigration::new(&mut host, &mut b, "b".into(), Limits::default()).run().await.unwrap_err();
    assert!(error.to_string().contains("same version"), "{error}");
    assert!(matches!(
        a.recv("", Duration::from_secs(1)).await.unwrap(),
        Item::Message(Message::Hello { .. })
    ));
    assert!(matches!(
        a.recv("", Duration::from_secs(1)).await.unwrap(),
        Item::Message(Message::Abort { .. })
    ));
}

/// One reason at the source, one that may be overridden at the destination.
fn misfits() -> (Finding, Finding) {
    (
        Finding::bad(Check::Devices, "device ballast", "start the VM without it"),
        Finding::bad(Check::CpuFeatures, "b lacks avx2", "use a named model"),
    )
}

#[tokio::test]
async fn all_reasons_of_both_sides_are_in_one_refusal() {
    let (here, there) = misfits();
    let world = World::new(Fault::default());
    {
        let mut world = world.lock().unwrap();
        world.findings = vec![there];
        world.no_path = true;
    }
    let mut plan = plan(None, false);
    plan.findings = vec![here];
    plan.prepare.check_only = true;
    let report = run(&world, plan).await;
    let reason = report.error_desc.clone().unwrap();
    for words in [
        "devices: device ballast: start the VM without it",
        "cpu-features: b lacks avx2",
        "path-mtu: none of",
    ] {
        assert!(reason.contains(words), "{words} in {reason}");
    }
    assert_eq!(report.status, Status::Failed);
    assert!(!world.lock().unwrap().calls.contains(&Call::Begin), "the VM is not touched");
    assert_sound(&report, &world, Fault::default());
}

#[tokio::test]
async fn force_overrides_what_may_be_and_the_report_names_it() {
    let (here, there) = misfits();
    for (own, force, expected) in
        [(None, false, Status::Failed), (None, true, Status::Completed), (Some(here), true, Status::Failed)]
    {
        let world = World::new(Fault::default());
        world.lock().unwrap().findings = vec![there.clone()];
        let mut plan = plan(None, false);
        plan.prepare.check_only = own.is_some();
        plan.findings.extend(own);
        plan.prepare.force = force;
        let report = run(&world, plan).await;
        assert_eq!(report.status, expected, "{:?}", report.error_desc);
        let named =
            report.notes.iter().any(|note| note == "overridden by --force: cpu-features: b lacks avx2");
        assert_eq!(named, expected == Status::Completed, "{:?}", report.notes);
        assert_sound(&report, &world, Fault::default());
    }
}

#[tokio::test]
async fn a_check_shows_everything_and_leaves_nothing() {
    let (here, there) = misfits();
    let world = World::new(Fault::default());
    world.lock().unwrap().findings = vec![there];
    let mut plan = plan(None, false);
    plan.findings = vec![here];
    plan.prepare.check_only = true;
    let (mut a, destination) = destination(&world);
    let (mut vm, mut memory, mut host) =
        (Source(Arc::clone(&world)), Memory(Arc::clone(&world)), Host(Arc::clone(&world)));
    let record = Recorder::new(Report::default());
    let findings = SourceMigration::new(&mut vm, &mut memory, &mut host, &mut a, plan, record).check().await;
    drop(a);
    assert!(destination.await.unwrap().is_err());
    let checks: Vec<Check> = findings.iter().map(|finding| finding.check).collect();
    let expected = [
        Check::Devices,
        Check::Peer,
        Check::ControlChannel,
        Check::ClockOffset,
        Check::CpuFeatures,
        Check::PathMtu,
    ];
    assert_eq!(checks, expected);
    let world = world.lock().unwrap();
    assert!(world.source_runs && !world.destination_exists);
    assert!(!world.source_journal.is_open() && !world.destination_journal.is_open());
}

#[tokio::test]
async fn what_is_not_admitted_is_neither_written_nor_started() {
    let world = World::new(Fault::default());
    world.lock().unwrap().unadmitted = vec![Finding::bad(Check::Admission, "b is full", "wait")];
    let mut plan = plan(None, false);
    plan.prepare.force = true;
    let report = run(&world, plan).await;
    assert!(report.error_desc.as_ref().unwrap().contains("admission: b is full: wait"), "{report:?}");
    assert_sound(&report, &world, Fault::default());
    let world = world.lock().unwrap();
    assert!(!world.calls.contains(&Call::Wait) && !world.calls.contains(&Call::Prepare));
}

/// A QEMU that was refused and does not end is tried again, and stays in the journal as long as it is there.
#[tokio::test]
async fn what_was_refused_and_does_not_end_is_not_forgotten() {
    for (times, ended) in [(1, true), (2, false)] {
        let world = World::new(Fault { destroy_fails: times, ..Fault::default() });
        world.lock().unwrap().findings = vec![misfits().1];
        let report = run(&world, plan(None, false)).await;
        assert_eq!(report.status, Status::Failed);
        let world = world.lock().unwrap();
        assert!(world.source_runs);
        assert_eq!((!world.destination_exists, !world.destination_journal.is_open()), (ended, ended));
    }
}

#[tokio::test]
async fn a_destination_that_refused_takes_no_page_and_no_commit() {
    let round = Message::RoundEnd { epoch: 1, frames: vec![0], last: true, transit_us: 0 };
    for next in
        [round, Message::StateEnd { bytes: 0 }, Message::Commit(crate::control::Commit { digest: None })]
    {
        let world = World::new(Fault::default());
        world.lock().unwrap().findings = vec![misfits().1];
        let (mut a, destination) = destination(&world);
        for message in [Message::hello("a"), Message::Prepare(Box::new(plan(None, false).prepare)), next] {
            a.send(Item::Message(message)).await.unwrap();
        }
        let error = destination.await.unwrap().unwrap_err();
        assert!(matches!(error, MigrationError::Unexpected { .. }), "{error}");
        assert!(!world.lock().unwrap().destination_exists);
    }
}
