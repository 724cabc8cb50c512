//! A third host on the migration network that sees everything and sends what it likes: none of it becomes a page, all of it
//! is counted, and the migration completes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use xferry_lab::guest::GuestKind;
use xferry_lab::intruder::{
    Drops, Envelope, Form, Intruder, Kind, Replay, Sniffed, Sniffer, Stream, not_ours,
};
use xferry_lab::lab::plan::{INTRUDER_NIC, MIGRATION_NIC, MIGRATION_PORT};
use xferry_lab::lab::{Encryption, LabConfig, Process, Report, Side, netns, wait_for};
use xferry_lab::probe::PingProbe;
use xferry_lab::scenario::{self, MEMORY_MIB, Planted, Scenario, Workload, bare, status};
use xferry_lab::wire::PacketNic;

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Every page is compared before the VM runs at the other end. Slow enough to be attacked in several rounds.
const SLOWLY: [&str; 5] = ["--verify=full", "--downtime-limit", "100", "--bandwidth", "20"];
/// How often each kind of frame is sent where it is counted.
const TIMES: u64 = 40;
/// Between two attacks.
const PAUSE: Duration = Duration::from_millis(2);
/// Pages that only an intruder writes to.
const CANARIES: u64 = 64;
/// What it writes.
const FORGED: u8 = 0x66;

fn skipped(test: &str) -> bool {
    let reason = scenario::missing(GuestKind::Bare).or_else(xferry_lab::intruder::missing);
    if let Some(reason) = &reason {
        println!("skipped: {test}: {reason}");
    }
    reason.is_some()
}

/// A VM with pages of which it knows nothing, in a lab with an intruder.
struct Site {
    scenario: Scenario,
    intruder: Intruder,
    canaries: Planted,
}

impl Site {
    fn new(config: LabConfig) -> Self {
        let lab = LabConfig { intruder: true, ..config };
        let scenario = Scenario::started(lab, bare(Workload { mib: 48, rate: 2000 }).unwrap()).unwrap();
        let intruder = Intruder::enter(&scenario.lab).unwrap();
        let canaries = Planted::at_end(MEMORY_MIB, CANARIES, b"a page that nobody writes to. ");
        canaries.plant(&scenario.lab.a.vm_paths().ram).unwrap();
        Self { scenario, intruder, canaries }
    }

    fn drops(&self, side: Side) -> Drops {
        Drops::read(&self.scenario.lab, side).unwrap()
    }

    /// The VM has moved to host-b, and not one page of it is anybody else's.
    fn moved(&self, mut command: Process) -> Report {
        assert!(command.wait(LIMIT).unwrap().success(), "{}", command.output());
        self.has_moved()
    }

    /// The same when the command has ended well.
    fn has_moved(&self) -> Report {
        let report = self.scenario.lab.a.report(None).unwrap();
        assert_eq!((report.status(), report.verified()), (Some("completed"), Some(true)), "{:#}", report.0);
        assert_eq!(self.canaries.spoiled(&self.scenario.lab.b.vm_paths().ram).unwrap(), [0; 0]);
        let sum = |list: &str, name: &str| -> u64 {
            let list = report.get(&format!("/stream/{list}")).unwrap().as_array().unwrap();
            list.iter().map(|item| item[name].as_u64().unwrap()).sum()
        };
        // Frames that were placed are those that were sent.
        assert_eq!(sum("queues", "frames"), sum("lanes", "sent") - sum("lanes", "lost"), "{:#}", report.0);
        self.scenario.expect_moved(Side::A).unwrap();
        report
    }
}

/// Frames of the migration to host-b that reached its agent and were not used, so far.
fn refused(site: &Site) -> u64 {
    let status = status(&site.scenario.lab.b).unwrap();
    let queues = status["port"]["sessions"][0]["queues"].as_array().unwrap_or_else(|| panic!("{status:#}"));
    let used = ["queue", "frames", "reordered"];
    let counts = |queue: &Value| -> u64 {
        let fields = queue.as_object().unwrap().iter();
        fields
            .filter(|(name, _)| !used.contains(&name.as_str()))
            .filter_map(|(_, count)| count.as_u64())
            .sum()
    };
    queues.iter().map(counts).sum()
}

/// Sends each of `kinds`, alone, and expects that its counter rises, by that many, and no other.
fn expect_counted(site: &Site, kinds: &[Kind]) {
    for kind in kinds {
        let before = site.drops(Side::B);
        let sent = site.intruder.send((0..TIMES).map(|_| &kind.frame[..]));
        let mut now = before.clone();
        let counted = wait_for("the counter", LIMIT, || {
            now = site.drops(Side::B);
            Ok((now.of(kind.reason) - before.of(kind.reason) + now.lost_since(&before) >= sent).then_some(()))
        });
        let risen = now.since(&before);
        counted.unwrap_or_else(|error| panic!("{}: {error}; risen: {risen:?}", kind.name));
        assert!(risen.keys().all(|reason| reason == kind.reason), "{}: {risen:?}", kind.name);
        assert!(risen.values().all(|&count| count <= sent), "{}: {risen:?} of {sent}", kind.name);
    }
}

/// Attacks until the command ends; `attack` is called again and again.
fn until_end(command: &mut Process, mut attack: impl FnMut()) {
    wait_for("the migration to end", LIMIT, || {
        attack();
        thread::sleep(PAUSE);
        command.try_wait()
    })
    .unwrap();
}

fn frames(list: &[Vec<u8>]) -> impl Iterator<Item = &[u8]> {
    list.iter().map(Vec::as_slice)
}

#[test]
fn what_is_not_let_in_is_counted_by_reason() {
    if skipped("what_is_not_let_in_is_counted_by_reason") {
        return;
    }
    let site = Site::new(LabConfig::for_test());
    expect_counted(&site, &Kind::blind(&site.intruder, Side::B));
    let sniffer = site.intruder.sniff().unwrap();
    let command = site.scenario.begin(Side::A, &SLOWLY).unwrap();
    sniffer.wait(1, 1, LIMIT).unwrap();
    let stream = sniffer.stream().unwrap();
    expect_counted(&site, &Kind::knowing(&site.intruder, Side::B, stream));
    // It was a session all the time.
    let sessions = status(&site.scenario.lab.b).unwrap()["port"]["sessions"].clone();
    assert_eq!(sessions[0]["session"], stream.header.session, "it was over too early: {sessions}");
    assert_eq!(refused(&site), 0);
    site.moved(command);
}

#[test]
fn what_is_not_ours_reaches_the_kernel() {
    if skipped("what_is_not_ours_reaches_the_kernel") {
        return;
    }
    let site = Site::new(LabConfig::for_test());
    let (namespace, own) = (site.scenario.lab.b.namespace(), site.intruder.namespace());
    let nic = PacketNic::open(&namespace, MIGRATION_NIC).unwrap();
    let ping = PingProbe::start(own, Side::B.migration_ip()).unwrap();
    ping.wait_answered(LIMIT).unwrap();
    let before = site.drops(Side::B);
    let mut room = vec![0; 65_536];
    let mut arrives = |name: &str, frame: &[u8]| {
        site.intruder.send([frame]);
        wait_for(name, LIMIT, || {
            while let Some(len) = nic.receive(&mut room)? {
                if room[..len] == *frame {
                    return Ok(Some(()));
                }
            }
            Ok(None)
        })
        .unwrap();
    };
    not_ours(&site.intruder, Side::B).iter().for_each(|(name, frame)| arrives(name, frame));
    let command = site.scenario.begin(Side::A, &SLOWLY).unwrap();
    let begin = ping.mark();
    let listener = netns::inside(&namespace, || Ok(TcpListener::bind((Side::B.migration_ip(), 0))?)).unwrap();
    let address = listener.local_addr().unwrap();
    netns::inside(own, || Ok(TcpStream::connect_timeout(&address, LIMIT)?)).unwrap();
    listener.accept().unwrap();
    let end = ping.mark();
    assert!(!site.drops(Side::B).since(&before).values().any(|&count| count > 0));
    drop(nic);
    site.moved(command);
    let figures = ping.figures(begin, end);
    assert!(figures.sent == 0 || figures.lost < figures.sent, "{figures:?}");
    let figures = ping.figures(begin, ping.mark());
    assert!(figures.sent > 10 && figures.lost < figures.sent / 2, "{figures:?}");
}

/// At once and late, in everybody's name, in both directions, and after the end.
#[test]
fn replayed_frames_change_nothing() {
    if skipped("replayed_frames_change_nothing") {
        return;
    }
    let site = Site::new(LabConfig::for_test());
    let intruder = &site.intruder;
    let sniffer = intruder.sniff().unwrap();
    let mut command = site.scenario.begin(Side::A, &SLOWLY).unwrap();
    sniffer.wait(200, 4, LIMIT).unwrap();
    let again = |sniffed: &[Sniffed], replay: Replay, source: Side| {
        let frames: Vec<Vec<u8>> = sniffed.iter().map(|one| replay.frame(intruder, one, source)).collect();
        intruder.send(frames.iter().map(Vec::as_slice))
    };
    // Once where all is counted.
    let before = Side::BOTH.map(|side| site.drops(side));
    let first = sniffer.latest();
    let mut sent = BTreeMap::new();
    for replay in [Replay::Unchanged, Replay::OwnMac, Replay::OwnAddress, Replay::Reflected] {
        sent.insert(format!("{replay:?}"), again(&first, replay, Side::A));
    }
    wait_for("the counters", LIMIT, || {
        let [a, b] = Side::BOTH.map(|side| site.drops(side));
        let (lost_a, lost_b) = (a.lost_since(&before[0]), b.lost_since(&before[1]));
        let reflected =
            a.of("unknown-session") - before[0].of("unknown-session") + lost_a >= sent["Reflected"];
        let strange = b.of("wrong-peer") - before[1].of("wrong-peer") + lost_b >= sent["OwnAddress"];
        let known = refused(&site) + lost_b >= sent["Unchanged"] + sent["OwnMac"];
        Ok((reflected && strange && known).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}: {sent:?}; {}, {:?}", refused(&site), site.drops(Side::B)));
    // And all the time, to the end.
    until_end(&mut command, || {
        for sniffed in [sniffer.old(), sniffer.latest()] {
            for replay in [Replay::Unchanged, Replay::OwnMac, Replay::OwnAddress, Replay::Reflected] {
                again(&sniffed[..sniffed.len().min(16)], replay, Side::A);
            }
        }
        for replay in [Replay::Unchanged, Replay::OwnAddress, Replay::Reflected] {
            again(&sniffer.feedback(), replay, Side::B);
        }
    });
    assert!(!sniffer.old().is_empty(), "there was one round only");
    site.moved(command);
    let before = site.drops(Side::B);
    let sent = again(&sniffer.old(), Replay::Unchanged, Side::A);
    wait_for("the counter", LIMIT, || {
        let now = site.drops(Side::B);
        let counted = now.of("unknown-session") - before.of("unknown-session");
        Ok((counted + now.lost_since(&before) >= sent).then_some(()))
    })
    .unwrap();
    site.scenario.expect_whole(Side::B).unwrap();
    site.scenario.expect_migrates(Side::B, &["--verify=full"]).unwrap();
}

/// Forged frames in the peer's name, sound in all that need not be secret.
fn forgeries(site: &Site, sniffer: &Sniffer, round: u32) -> Vec<Vec<u8>> {
    let intruder = &site.intruder;
    let Some(stream) = sniffer.stream() else { return Vec::new() };
    let latest = sniffer.latest();
    let sniffed = &latest[round as usize % latest.len()];
    let canary = site.canaries.first + u64::from(round) % CANARIES;
    let last = stream.header.sequence;
    let mut bodies = Vec::new();
    // As what the two hosts send is guarded, as far as that can be forged; and as if it were not.
    for stream in [stream, stream.unsealed()] {
        // Numbers that were, that come next, and that come later.
        for sequence in [last / 2, last + 1 + round % 8, last + 100] {
            bodies.push(stream.pages(&[canary], FORGED, sequence));
            bodies.push(stream.zeros(canary, 1, sequence));
        }
        let mut next = stream;
        next.header.epoch += 1;
        bodies.push(next.pages(&[canary], FORGED, round % 64));
        let mut lane = stream;
        lane.header.lane += 1;
        bodies.push(lane.pages(&[canary], FORGED, round % 64));
    }
    // One bit of what was sent: in its tag or last page, of its epoch, lane or number, of its descriptors or first page.
    bodies.push(stream.changed(sniffed, sniffed.payload().len() - 1));
    for at in [16, 20, 24, 40 + round as usize % 64] {
        bodies.push(stream.changed(sniffed, at));
    }
    let envelope = Envelope {
        from: intruder.host(Side::A),
        to: intruder.host(Side::B),
        ports: (sniffed.ports().0, MIGRATION_PORT),
        form: Form::Plain,
    };
    let forms = [Form::Plain, Form::Tagged, Form::Mapped];
    let wrap = |body: &Vec<u8>| forms.map(|form| Envelope { form, ..envelope }.wrap(body));
    bodies.iter().flat_map(wrap).collect()
}

#[test]
fn forged_frames_become_no_pages() {
    if skipped("forged_frames_become_no_pages") {
        return;
    }
    let site = Site::new(LabConfig::for_test().encryption(Encryption::Required));
    let sniffer = site.intruder.sniff().unwrap();
    let mut command = site.scenario.begin(Side::A, &SLOWLY).unwrap();
    sniffer.wait(1, 1, LIMIT).unwrap();
    // Once where all is counted.
    let before = site.drops(Side::B);
    let sent = site.intruder.send(frames(&forgeries(&site, &sniffer, 0)));
    wait_for("the counters", LIMIT, || {
        let lost = site.drops(Side::B).lost_since(&before);
        Ok((refused(&site) + lost >= sent).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}: {} of {sent}", refused(&site)));
    assert_eq!(site.drops(Side::B).since(&before), BTreeMap::new(), "the bouncer is not what is tested here");
    let mut round = 1;
    until_end(&mut command, || {
        site.intruder.send(frames(&forgeries(&site, &sniffer, round)));
        round += 1;
    });
    assert!(round > 10, "{round} attacks only");
    site.moved(command);
}

/// A window that somebody else opens or shuts costs frames, not pages.
#[test]
fn forged_feedback_changes_no_page() {
    if skipped("forged_feedback_changes_no_page") {
        return;
    }
    let site = Site::new(LabConfig::for_test());
    let intruder = &site.intruder;
    let sniffer = intruder.sniff().unwrap();
    let mut command = site.scenario.begin(Side::A, &["--verify=full", "--bandwidth", "100"]).unwrap();
    sniffer.wait(1, 1, LIMIT).unwrap();
    until_end(&mut command, || {
        let feedback = sniffer.feedback();
        let ports = feedback[0].ports();
        let from = [intruder.host(Side::B), intruder.own()];
        for sniffed in &feedback {
            for from in from {
                let envelope = Envelope { from, to: intruder.host(Side::A), ports, form: Form::Plain };
                for seen in [0, 1, u32::MAX] {
                    let forged = Stream::feedback(sniffed, seen).map(|payload| envelope.wrap(&payload));
                    intruder.send(frames(&forged));
                }
            }
        }
    });
    site.moved(command);
}

#[test]
fn flood_of_strangers_is_counted_and_the_vm_moves() {
    if skipped("flood_of_strangers_is_counted_and_the_vm_moves") {
        return;
    }
    let site = Site::new(LabConfig::for_test());
    let kinds = Kind::blind(&site.intruder, Side::B);
    let stranger = &kinds[0];
    assert_eq!(stranger.frame.len(), 60, "64 bytes with the checksum that a NIC adds");
    let before = site.drops(Side::B);
    let flood = site.intruder.flood(&stranger.frame, Some(30_000)).unwrap();
    let output = site.scenario.migrate(Side::A, &["--verify=full", "--downtime-limit", "5000"]).unwrap();
    assert!(output.status.success(), "{}{}", output.stdout, output.stderr);
    let report = site.has_moved();
    let sent = flood.sent();
    drop(flood);
    let own = scenario::link(site.intruder.namespace(), INTRUDER_NIC).unwrap();
    wait_for("the counter", LIMIT, || {
        let now = site.drops(Side::B);
        let counted = now.of(stranger.reason) - before.of(stranger.reason);
        Ok((counted + now.lost_since(&before) >= sent).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}: {sent} {:?} {own:#}", site.drops(Side::B)));
    println!("{sent} strangers; frames lost: {}", report.get("/stream/lanes/0/lost").unwrap());
}
