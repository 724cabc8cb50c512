use super::*;
use proptest::prelude::*;

fn journal() -> (tempfile::TempDir, PathBuf, Journal) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("handover.journal");
    let journal = Journal::open(&path).unwrap();
    (dir, path, journal)
}

fn session(number: u64, vm: &str) -> Session {
    Session {
        session: number,
        id: format!("host-a-{number}"),
        vm: vm.into(),
        peer_name: None,
        peer: Some("10.0.0.2:4790".parse().unwrap()),
        keep_source: false,
        ram: vec!["/dev/shm/web".into()],
    }
}

#[test]
fn what_was_written_is_known_after_a_restart() {
    let (_dir, path, journal) = journal();
    journal.offer(session(1, "web")).unwrap();
    journal.wait(session(2, "db")).unwrap();
    assert_eq!(journal.decide(2, Verdict::Accepted).unwrap(), Recorded::Written);
    journal.offer(session(3, "done")).unwrap();
    journal.conclude(3, Verdict::Refused).unwrap();
    journal.offer(session(4, "sent")).unwrap();
    journal.commit(4).unwrap();
    drop(journal);
    for _ in 0..2 {
        let journal = Journal::open(&path).unwrap();
        let open = journal.open_sessions();
        let facts: Vec<_> = open
            .iter()
            .map(|open| (open.session.vm.as_str(), open.role, open.state.committed, open.state.verdict))
            .collect();
        assert_eq!(
            facts,
            [
                ("web", Role::Source, false, None),
                ("db", Role::Destination, false, Some(Verdict::Accepted)),
                ("sent", Role::Source, true, None),
            ]
        );
        assert_eq!(open[0].session, session(1, "web"));
        assert_eq!(journal.ids().len(), 4);
    }
}

#[test]
fn a_session_is_one_migrations_and_nobody_elses() {
    let (_dir, _path, journal) = journal();
    let of = |number, peer: &str| Session { peer_name: Some(peer.into()), ..session(number, "web") };
    journal.offer(of(1, "host-b")).unwrap();
    journal.wait(of(2, "host-b")).unwrap();
    // More is known of it.
    journal.wait(Session { ram: vec![], ..of(2, "host-b") }).unwrap();
    let other = Session { id: "host-c-9".into(), vm: "db".into(), ..of(2, "host-c") };
    let taken = [
        journal.wait(of(1, "host-c")),
        journal.wait(of(2, "host-c")),
        journal.wait(other),
        journal.offer(of(2, "host-b")),
    ];
    for refused in taken {
        assert!(refused.unwrap_err().to_string().contains("is migration host-a-"));
    }
    let begun = |number| journal.begun(number).map(|(role, session)| (role, session.peer_name.unwrap()));
    assert_eq!(begun(1), Some((Role::Source, "host-b".into())));
    assert_eq!(begun(2), Some((Role::Destination, "host-b".into())));
    // Not after its end either: who asks about it is to hear how it ended.
    journal.conclude(2, Verdict::Refused).unwrap();
    assert!(journal.wait(of(2, "host-c")).is_err());
}

#[test]
fn the_first_decision_stands() {
    let (_dir, path, journal) = journal();
    assert_eq!(
        journal.asked_by_source(6).unwrap(),
        None,
        "never heard of, or forgotten: not for this host to say"
    );
    journal.wait(session(7, "web")).unwrap();
    assert_eq!(journal.asked_by_source(7).unwrap(), Some(Verdict::Refused));
    assert_eq!(journal.decide(7, Verdict::Accepted).unwrap(), Recorded::Otherwise);
    journal.wait(session(8, "web")).unwrap();
    journal.decide(8, Verdict::Accepted).unwrap();
    assert_eq!(journal.asked_by_source(8).unwrap(), None, "it is just being taken");
    assert_eq!(journal.decide(8, Verdict::Refused).unwrap(), Recorded::Otherwise);
    journal.revoke(8).unwrap();
    assert_eq!(journal.asked_by_source(8).unwrap(), Some(Verdict::Refused));
    drop(journal);
    let journal = Journal::open(&path).unwrap();
    assert_eq!(journal.decide(7, Verdict::Accepted).unwrap(), Recorded::Otherwise);
    assert_eq!(journal.decide(8, Verdict::Accepted).unwrap(), Recorded::Otherwise);
}

#[test]
fn a_claim_is_granted_unless_the_source_was_told_otherwise() {
    let (_dir, _path, journal) = journal();
    assert_eq!(journal.claimed_by_destination(1, true).unwrap(), None, "never heard of");
    journal.offer(session(1, "web")).unwrap();
    assert_eq!(journal.claimed_by_destination(1, true).unwrap(), None, "never committed");
    journal.commit(1).unwrap();
    assert_eq!(journal.claimed_by_destination(1, true).unwrap(), Some(Verdict::Accepted));
    assert_eq!(journal.decide(1, Verdict::Refused).unwrap(), Recorded::Otherwise, "too late to keep it");
    journal.offer(session(2, "db")).unwrap();
    journal.commit(2).unwrap();
    journal.decide(2, Verdict::Refused).unwrap();
    assert_eq!(journal.claimed_by_destination(2, true).unwrap(), Some(Verdict::Refused));
    // Whether a VM that is gone ever ran, only a source knows that has heard so.
    assert_eq!(journal.claimed_by_destination(1, false).unwrap(), None);
    journal.conclude(1, Verdict::Accepted).unwrap();
    assert_eq!(journal.claimed_by_destination(1, false).unwrap(), Some(Verdict::Accepted));
}

#[test]
fn an_offer_of_an_older_version_counts_as_committed() {
    let (_dir, path, journal) = journal();
    drop(journal);
    let json = r#"{"record":"offered","session":5,"vm":"web","peer":"10.0.0.2:4790"}"#;
    std::fs::write(&path, format!("{:08x} {json}\n", crate::checksum::crc32c(json.as_bytes()))).unwrap();
    assert!(Journal::open(&path).unwrap().state(5).committed, "it may have been sent");
}

#[test]
fn a_later_session_of_a_vm_ends_what_an_earlier_one_could_not_write() {
    let (_dir, path, journal) = journal();
    journal.offer(session(1, "web")).unwrap();
    journal.commit(1).unwrap();
    journal.offer(session(2, "db")).unwrap();
    journal.wait(session(3, "web")).unwrap();
    drop(journal);
    let open = Journal::open(&path).unwrap().open_sessions();
    assert_eq!(open.iter().map(|open| open.session.session).collect::<Vec<_>>(), [2, 3]);
}

#[test]
fn a_torn_tail_is_cut_and_a_damaged_middle_is_not_ignored() {
    let (_dir, path, journal) = journal();
    journal.offer(session(1, "web")).unwrap();
    journal.offer(session(2, "db")).unwrap();
    drop(journal);
    let whole = std::fs::read(&path).unwrap();
    for cut in 0..whole.len() {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let open = Journal::open(&path).unwrap().open_sessions().len();
        let lines = whole[..cut].iter().filter(|&&byte| byte == b'\n').count();
        assert_eq!(open, lines, "cut at {cut}");
    }
    let mut damaged = whole.clone();
    damaged[12] ^= 1;
    std::fs::write(&path, &damaged).unwrap();
    let error = Journal::open(&path).err().unwrap();
    assert!(error.to_string().contains("line 1"), "{error}");
}

#[test]
fn a_full_disk_is_an_error_and_nothing_is_decided() {
    let full = Path::new("/dev/full");
    if !full.exists() {
        println!("skipped: a_full_disk_is_an_error: there is no /dev/full here");
        return;
    }
    let (_dir, path, journal) = journal();
    let file =
        std::mem::replace(&mut journal.lock().file, OpenOptions::new().append(true).open(full).unwrap());
    assert!(journal.offer(session(1, "web")).is_err());
    assert!(journal.decide(1, Verdict::Accepted).is_err());
    assert!(journal.open_sessions().is_empty());
    // There is room again: what was half written before is not in the way.
    journal.lock().file = file;
    journal.offer(session(2, "db")).unwrap();
    drop(journal);
    assert_eq!(Journal::open(&path).unwrap().open_sessions().len(), 1);
}

#[test]
fn old_ends_are_forgotten_and_open_ones_never() {
    let (_dir, path, journal) = journal();
    journal.offer(session(1_000_000, "web")).unwrap();
    {
        let mut inner = journal.lock();
        for session in 0..REMEMBERED as u64 + 50 {
            let text = line(&Record::Decided { session, verdict: Verdict::Refused });
            inner.file.write_all(&text).unwrap();
        }
    }
    drop(journal);
    let journal = Journal::open(&path).unwrap();
    assert_eq!(journal.open_sessions().len(), 1);
    assert_eq!(journal.lock().sessions.len(), REMEMBERED + 1);
    assert!(!journal.lock().sessions.contains_key(&0), "the oldest went");
}

fn verdicts() -> impl Strategy<Value = Verdict> {
    prop_oneof![Just(Verdict::Accepted), Just(Verdict::Refused)]
}

/// Few numbers and VMs, so that records have to do with each other; all else is arbitrary.
fn sessions() -> impl Strategy<Value = Session> {
    use proptest::{collection::vec, option};
    let peer = option::of((any::<std::net::IpAddr>(), any::<u16>()).prop_map(SocketAddr::from));
    let vm = prop_oneof!["web", "db"];
    (0u64..5, ".{0,12}", vm, peer, option::of(".{0,12}"), any::<bool>(), vec("/.{0,12}", 0..3)).prop_map(
        |(session, id, vm, peer, peer_name, keep_source, ram)| Session {
            session,
            id,
            vm,
            peer,
            peer_name,
            keep_source,
            ram: ram.into_iter().map(PathBuf::from).collect(),
        },
    )
}

fn records() -> impl Strategy<Value = Record> {
    prop_oneof![
        sessions().prop_map(Record::Offered),
        sessions().prop_map(Record::Waiting),
        (0u64..5).prop_map(|session| Record::Committed { session }),
        (0u64..5, verdicts()).prop_map(|(session, verdict)| Record::Decided { session, verdict }),
        (0u64..5, proptest::option::of(verdicts()))
            .prop_map(|(session, verdict)| Record::Concluded { session, verdict }),
    ]
}

/// What a host knows after it read `bytes`.
fn read(bytes: &[u8]) -> BTreeMap<u64, Entry> {
    let (mut sessions, mut next) = (BTreeMap::new(), 0);
    parse(bytes).unwrap().into_iter().for_each(|record| apply(&mut sessions, &mut next, record));
    sessions
}

proptest! {
    #[test]
    fn records_come_out_as_they_went_in(records in proptest::collection::vec(records(), 0..20)) {
        let bytes: Vec<u8> = records.iter().flat_map(line).collect();
        prop_assert_eq!(parse(&bytes).unwrap(), records);
    }

    /// However often it is written anew: who has which VM does not change by it.
    #[test]
    fn a_restart_changes_nothing(records in proptest::collection::vec(records(), 0..20)) {
        let known = |sessions: &BTreeMap<u64, Entry>| -> Vec<_> {
            sessions.iter().map(|(&number, entry)| (number, entry.begun.clone(), entry.state)).collect()
        };
        let mut before = read(&records.iter().flat_map(line).collect::<Vec<u8>>());
        let mut after = read(&compact(&mut before));
        prop_assert_eq!(known(&after), known(&before));
        prop_assert_eq!(known(&read(&compact(&mut after))), known(&before));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse(&bytes);
    }
}

#[test]
fn an_open_session_outlives_any_number_of_restarts() {
    // The earlier session of the same VM has the higher number: numbers are random.
    for (earlier, later) in [(9, 3), (3, 9)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        {
            let journal = Journal::open(&path).unwrap();
            journal.offer(session(earlier, "web")).unwrap();
            journal.conclude(earlier, Verdict::Refused).unwrap();
            journal.offer(session(later, "web")).unwrap();
            journal.commit(later).unwrap();
        }
        for restart in 0..3 {
            let open: Vec<u64> = Journal::open(&path)
                .unwrap()
                .open_sessions()
                .iter()
                .map(|open| open.session.session)
                .collect();
            assert_eq!(open, [later], "restart {restart}");
        }
    }
}
