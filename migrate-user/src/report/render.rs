//! A report for people.

use std::fmt::Write;

use super::{Compression, LaneFigures, Report, Round, RoundEstimate, Status, Stream, Stuns, Transport};
use crate::datapath::QueueFigures;

const MIB: f64 = 1024.0 * 1024.0;

/// Head of the table of rounds.
pub fn header() -> String {
    format!(
        "{:>5}  {:>10}  {:>9}  {:>9}  {:>12}  {:>6}  {:>11}  {:>8}",
        "round", "MiB to send", "seconds", "MiB/s", "MiB dirtied", "lost", "ms if ended", "throttle"
    )
}

/// One line of the table.
pub fn round_line(round: &Round, page_size: u64) -> String {
    let mib = |pages: u64| (pages * page_size) as f64 / MIB;
    let seconds = round.duration_ms / 1e3;
    let rate = if seconds > 0.0 { round.bytes as f64 / MIB / seconds } else { 0.0 };
    let name = if round.last { "last".to_owned() } else { round.round.to_string() };
    let dirtied = if round.last { "stopped".to_owned() } else { format!("{:.2}", mib(round.dirtied_pages)) };
    let (blackout, throttle) = match &round.estimate {
        None => (String::new(), String::new()),
        Some(RoundEstimate { expected_downtime, cpu_throttle_percentage, .. }) => {
            let throttled = *cpu_throttle_percentage > 0;
            let throttle = if throttled { format!("{cpu_throttle_percentage} %") } else { String::new() };
            (format!("{expected_downtime:.1}"), throttle)
        }
    };
    let line = format!(
        "{name:>5}  {:>11.2}  {seconds:>9.4}  {rate:>9.0}  {dirtied:>12}  {:>6}  {blackout:>11}  {throttle:>8}",
        mib(round.pages),
        round.lost_frames
    );
    line.trim_end().to_owned()
}

/// What is said when it is over.
pub fn closing(report: &Report) -> String {
    let mut out = String::new();
    let outcome = match report.status {
        Status::Completed => format!("{} runs on {}", report.vm, report.destination),
        Status::Cancelled => format!("cancelled: {} runs on at {}", report.vm, report.source),
        Status::Failed => format!("failed: {} runs on at {}", report.vm, report.source),
        Status::Died => {
            format!("{} DIED on {} and runs nowhere: start it anew", report.vm, report.destination)
        }
        Status::Unsettled => format!("UNSETTLED: {} is paused at {}", report.vm, report.source),
        Status::Active => format!("{} is on its way to {}", report.vm, report.destination),
    };
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{outcome}");
    if let Some(error) = &report.error_desc {
        let _ = writeln!(out, "  reason      {error}");
    }
    let _ = writeln!(
        out,
        "  total       {:.0} ms, of which {:.0} ms set-up{}; {} rounds",
        report.total_time,
        report.setup_time,
        if report.pinning > 0.0 { format!(" (pinning RAM {:.0})", report.pinning) } else { String::new() },
        report.rounds.len()
    );
    if report.downtime > 0.0 {
        let p = &report.downtime_phases;
        let _ = write!(
            out,
            "  blackout    {:.1} ms = stop {:.1} + last pages {:.1} + state {:.1} + load {:.1} + resume {:.1}",
            report.downtime, p.stop, p.last_pages, p.state, p.load, p.resume
        );
        if p.verify > 0.0 {
            let _ = write!(out, " + verify {:.1}", p.verify);
        }
        if let (Some(expected), Some(error)) = (report.expected_downtime, report.prediction_error) {
            let _ = write!(out, "; {expected:.1} ms predicted ({error:+.1})");
        }
        let _ = writeln!(out);
    }
    guest(&mut out, report);
    let _ = writeln!(
        out,
        "  memory      {:.0} MiB, {:.1} MiB on the wire, {} pages sent, {} zero",
        report.ram.total as f64 / MIB,
        report.ram.transferred as f64 / MIB,
        report.ram.normal,
        report.ram.duplicate
    );
    if report.unchanged.looked_at > 0 {
        let _ = writeln!(
            out,
            "  unchanged   {} of {} pages of dirty huge pages were not sent again",
            report.unchanged.pages, report.unchanged.looked_at
        );
    }
    if !report.compression.mode.is_empty() {
        let _ = writeln!(out, "  compression {}", compression(&report.compression));
    }
    frames(&mut out, &report.stream);
    let t = &report.transport;
    let _ = writeln!(
        out,
        "  transport   {}, MTU {}{}, {} lane(s), encryption {}; receiver {}",
        sender(t),
        t.mtu,
        far(t.round_trip),
        t.lanes,
        if t.encryption.is_empty() { "?" } else { &t.encryption },
        t.receiver
    );
    if !report.scan_mode.is_empty() {
        let _ = writeln!(out, "  dirty scan  {}", report.scan_mode);
    }
    if let Some(verified) = report.verified {
        let _ = writeln!(out, "  verified    {}", if verified { "all RAM equal" } else { "RAM DIFFERS" });
    }
    if report.status == Status::Completed {
        let _ = writeln!(out, "  announced   {} RARP frames", report.announce.rarp_sent);
    }
    for note in &report.notes {
        let _ = writeln!(out, "  note        {note}");
    }
    out
}

fn compression(c: &Compression) -> String {
    match c.pages {
        0 => format!("{}: no page packed", c.mode),
        pages => format!(
            "{}: {pages} pages packed to {:.1} MiB, {:.2} : 1, in {:.0} ms",
            c.mode,
            c.compressed_size as f64 / MIB,
            c.compression_rate,
            c.busy_ms
        ),
    }
}

/// How it goes for a migration that is under way: one line, indented.
pub fn convergence(report: &Report) -> String {
    let limit = match report.max_bandwidth {
        0 => "no limit on the wire".to_owned(),
        bytes => format!("at most {:.0} MiB/s on the wire", bytes as f64 / MIB),
    };
    let throttle = match report.cpu_throttle_percentage {
        0 => String::new(),
        percent => format!("; guest throttled by {percent} %"),
    };
    let Some(estimate) = report.rounds.iter().rev().find_map(|round| round.estimate) else {
        return format!("            {limit}{throttle}");
    };
    format!(
        "            {:.0} MiB/s (confidence {:.2}), the guest writes {:.0} pages/s ({:.2}), blackout if ended now {:.0} ms; {limit}{throttle}",
        estimate.bandwidth / MIB,
        estimate.bandwidth_confidence,
        estimate.dirty_pages_rate,
        estimate.dirty_rate_confidence,
        estimate.expected_downtime
    )
}

/// What the guest noticed while it ran.
fn guest(out: &mut String, report: &Report) {
    if let Some(mechanism) = &report.throttle {
        let throttled = report.rounds.iter().filter_map(|round| round.estimate);
        let most = throttled.map(|estimate| estimate.cpu_throttle_percentage).max().unwrap_or(0);
        let most = most.max(report.cpu_throttle_percentage);
        let now = if report.cpu_throttle_percentage > 0 { "still on" } else { "lifted" };
        let _ = writeln!(out, "  throttle    up to {most} % of each vCPU's time, by {mechanism}; {now}");
    }
    let Stuns { count, total, longest } = report.stuns;
    if count > 0 {
        let _ =
            writeln!(out, "  stuns       {count} for scans, {total:.1} ms in all, at most {longest:.1} ms");
    }
}

/// A path so long that it shows in the blackout.
fn far(round_trip_ms: f64) -> String {
    if round_trip_ms < 1.0 { String::new() } else { format!(", {round_trip_ms:.1} ms there and back") }
}

/// By what the source sent.
fn sender(t: &Transport) -> String {
    match &t.fallback {
        Some(reason) => format!("{} ({reason})", t.mode),
        None if t.xdp_mode == "none" => t.mode.clone(),
        None => {
            let copy = if t.zero_copy { "zero-copy" } else { "copy mode" };
            format!("{}, XDP {}, {copy}", t.mode, t.xdp_mode)
        }
    }
}

/// How frames fared; by lane and queue where there are several.
fn frames(out: &mut String, stream: &Stream) {
    if stream.lanes.is_empty() {
        return;
    }
    let total = LaneFigures {
        sent: stream.over_lanes(|lane| lane.sent),
        lost: stream.over_lanes(|lane| lane.lost),
        stalls: stream.over_lanes(|lane| lane.stalls),
        ..LaneFigures::default()
    };
    let arrived = QueueFigures {
        reordered: stream.over_queues(|queue| queue.reordered),
        duplicates: stream.over_queues(|queue| queue.duplicates),
        corrupt: stream.over_queues(|queue| queue.corrupt),
        bad_tag: stream.over_queues(|queue| queue.bad_tag),
        stale: stream.over_queues(|queue| queue.stale),
        malformed: stream.over_queues(|queue| queue.malformed),
        ..QueueFigures::default()
    };
    let _ = writeln!(out, "  frames      {}; {}", lane_line(&total), queue_line(&arrived));
    if stream.lanes.len() > 1 {
        for lane in &stream.lanes {
            let _ = writeln!(out, "    lane {:<4} {}", lane.lane, lane_line(lane));
        }
    }
    if stream.queues.len() > 1 {
        for queue in &stream.queues {
            let _ =
                writeln!(out, "    queue {:<3} {} placed, {}", queue.queue, queue.frames, queue_line(queue));
        }
    }
}

fn lane_line(lane: &LaneFigures) -> String {
    format!("{} sent, {} lost, {} stalls", lane.sent, lane.lost, lane.stalls)
}

/// What came to a queue and was not simply placed.
pub fn queue_line(queue: &QueueFigures) -> String {
    format!(
        "{} reordered, {} duplicate, {} corrupt, {} bad tag, {} stale, {} malformed",
        queue.reordered, queue.duplicates, queue.corrupt, queue.bad_tag, queue.stale, queue.malformed
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::LaneLosses;

    #[test]
    fn columns_stay_under_their_heads() {
        let round = Round {
            round: 0,
            pages: 131_072,
            bytes: 512 << 20,
            duration_ms: 500.0,
            dirtied_pages: 1280,
            ..Round::default()
        };
        assert_eq!(
            round_line(&round, 4096),
            "    0       512.00     0.5000       1024          5.00       0"
        );
        let estimate = RoundEstimate {
            expected_downtime: 9.25,
            cpu_throttle_percentage: 52,
            ..RoundEstimate::default()
        };
        let line = round_line(&Round { estimate: Some(estimate), ..round }, 4096);
        assert!(line.ends_with("0          9.2      52 %"), "{line}");
        assert_eq!(header().len(), line.len());
    }

    #[test]
    fn what_the_guest_noticed_is_told() {
        let mut report = Report::default();
        assert!(!closing(&report).contains("throttle") && !closing(&report).contains("stuns"));
        report.throttle = Some("cpu.max of cgroup v2".into());
        let estimate = RoundEstimate { cpu_throttle_percentage: 71, ..RoundEstimate::default() };
        report.rounds.push(Round { estimate: Some(estimate), ..Round::default() });
        report.stuns.add(1.5);
        report.stuns.add(2.5);
        (report.downtime, report.expected_downtime, report.prediction_error) = (12.0, Some(10.0), Some(2.0));
        let text = closing(&report);
        for line in [
            "throttle    up to 71 % of each vCPU's time, by cpu.max of cgroup v2; lifted",
            "stuns       2 for scans, 4.0 ms in all, at most 2.5 ms",
            "; 10.0 ms predicted (+2.0)\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }

    #[test]
    fn frames_are_told_in_all_and_by_lane_and_queue() {
        let mut report = Report::default();
        assert!(!closing(&report).contains("frames"));
        let queue = |queue, corrupt| QueueFigures { queue, corrupt, ..QueueFigures::default() };
        let lost = LaneLosses { lane: 1, missing: vec![(2, 5)] };
        report.stream.add_round(
            &[10, 20],
            &[0, 1],
            std::slice::from_ref(&lost),
            vec![queue(0, 1), queue(1, 2)],
        );
        report.stream.add_round(&[1, 2], &[0, 0], &[lost], vec![queue(0, 1), queue(1, 4)]);
        let text = closing(&report);
        assert!(
            text.contains("frames      33 sent, 6 lost, 1 stalls; 0 reordered, 0 duplicate, 5 corrupt"),
            "{text}"
        );
        assert!(text.contains("lane 1    22 sent, 6 lost") && text.contains("queue 1   0 placed"), "{text}");
    }

    #[test]
    fn failures_say_who_has_the_vm_and_why() {
        let report = Report {
            vm: "web".into(),
            source: "a".into(),
            status: Status::Failed,
            error_desc: Some("no carrier".into()),
            ..Report::default()
        };
        let text = closing(&report);
        assert!(text.contains("web runs on at a") && text.contains("no carrier"), "{text}");
    }
}
