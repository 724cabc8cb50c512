//! `status`, `report`, `cancel`.

use anyhow::Result;
use serde_json::Value;
use xferry::{
    agent::{CancelAnswer, CertificateStatus, Progress, Unsettled},
    datapath::QueueFigures,
    report::{self, Report},
};

use super::client::Client;

pub async fn status(client: &Client, json: bool) -> Result<u8> {
    let status: Value = client.get("/v1/status").await?;
    if json {
        println!("{}", serde_json::to_string_pretty(&status)?);
        return Ok(0);
    }
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let port = &status["port"];
    println!("{} (xferry {}){}", text(&status["name"]), text(&status["version"]), secured(&status));
    let certificate: Option<CertificateStatus> =
        serde_json::from_value(status["certificate"].clone()).unwrap_or_default();
    if let Some(certificate) = certificate {
        println!("  {}", ending(&certificate));
    }
    if let Some(hint) = status["socket"]["hint"].as_str() {
        println!("  API: {hint}");
    }
    println!(
        "  migration NIC {} {}, MTU {}, {}, {} queue(s)",
        text(&port["interface"]),
        text(&port["address"]),
        port["mtu"],
        transport(port),
        port["queues"]
    );
    if let Some(cpus) = port["cpus"].as_str() {
        println!("  pages are moved on processors {cpus}");
    }
    if let Some(reason) = port["fallback"].as_str() {
        println!("  NO AF_XDP: {reason}");
    }
    let dropped: Vec<String> = port["drops"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|drop| drop["frames"] != 0)
        .map(|drop| format!("{} {}", drop["frames"], text(&drop["reason"])))
        .collect();
    let dropped = if dropped.is_empty() { "none".to_owned() } else { dropped.join(", ") };
    println!(
        "  frames not let in: {dropped}; corrupt {}; without buffer {}",
        port["corrupt"], port["no-buffer"]
    );
    for session in port["sessions"].as_array().into_iter().flatten() {
        let queues: Vec<QueueFigures> = serde_json::from_value(session["queues"].clone()).unwrap_or_default();
        for queue in queues {
            println!(
                "  session {} queue {}: {} frames placed, {}",
                session["session"],
                queue.queue,
                queue.frames,
                report::queue_line(&queue)
            );
        }
    }
    let reports =
        |name: &str| -> Vec<Report> { serde_json::from_value(status[name].clone()).unwrap_or_default() };
    for report in reports("leaving") {
        println!(
            "  leaving   {} {} to {}: {:?}, {} rounds, {:.1} s",
            report.id,
            report.vm,
            report.destination,
            report.phase,
            report.rounds.len(),
            report.total_time / 1e3
        );
        println!("{}", report::convergence(&report));
    }
    for vm in status["arriving"].as_array().into_iter().flatten() {
        println!("  arriving  {}", text(vm));
    }
    let unsettled: Vec<Unsettled> = serde_json::from_value(status["unsettled"].clone()).unwrap_or_default();
    for open in unsettled {
        println!("  UNSETTLED {} {}: {}", open.id, open.vm, open.state);
        if let Some(choice) = &open.choice {
            println!(
                "  If the other host is gone for good, `xferry resolve {}` with one of these, whose condition must hold:",
                open.id
            );
            print!("{}", super::resolve::explained(choice));
        }
    }
    for report in reports("recent") {
        let reason = report.error_desc.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
        println!(
            "  {:?}  {} {} to {}, blackout {:.1} ms{reason}",
            report.status, report.id, report.vm, report.destination, report.downtime
        );
    }
    Ok(0)
}

/// By what frames get on and off the NIC.
fn transport(port: &Value) -> String {
    if port["transport"] == "udp" {
        return port["choice"].as_str().map_or("UDP sockets".into(), |why| format!("UDP sockets ({why})"));
    }
    let copy = if port["zero-copy"] == true { "zero-copy" } else { "copy mode" };
    format!("XDP {}, {copy}", port["xdp-mode"].as_str().unwrap_or("none"))
}

/// How the agent's channels are secured.
fn secured(status: &Value) -> &'static str {
    match (status["encrypted"] == true, status["page-encryption"].as_str()) {
        (false, _) => ", NOT ENCRYPTED, NOT AUTHENTICATED (insecure = true)",
        (true, Some("required")) => ", control channel and pages authenticated and encrypted",
        (true, Some("preferred")) => {
            ", control channel authenticated and encrypted (TLS 1.3), pages too where the other host does it"
        }
        (true, _) => ", control channel authenticated and encrypted (TLS 1.3), pages NOT ENCRYPTED",
    }
}

fn ending(certificate: &CertificateStatus) -> String {
    let CertificateStatus { name, expires, days_left, ends_soon, is_revoked, revoked, problem } = certificate;
    let renew = format!("issue a new one (`xferry pki issue {name}`) and copy it here");
    let mut text = match (*days_left, ends_soon) {
        (..0, _) => {
            format!("CERTIFICATE of {name} HAS EXPIRED on {expires}, and peers refuse it: {renew}")
        }
        (days, true) => format!("CERTIFICATE of {name} ENDS on {expires} ({days} days): {renew}"),
        (days, false) => format!("certificate of {name} until {expires} ({days} days)"),
    };
    if *revoked > 0 {
        text += &format!(", {revoked} on the list of revoked ones");
    }
    if *is_revoked {
        text += &format!("\n  CERTIFICATE of {name} IS REVOKED, and peers refuse it: {renew}");
    }
    if let Some(problem) = problem {
        text += &format!("\n  NEW CERTIFICATES ARE NOT TAKEN, the ones before stay in use: {problem}");
    }
    text
}

pub async fn report(client: &Client, id: Option<&str>, json: bool) -> Result<u8> {
    let report: Report = match id {
        Some(id) => client.get::<Progress>(&format!("/v1/migrations/{id}")).await?.report,
        None => client.get("/v1/reports/latest").await?,
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(0);
    }
    println!("{}: {} from {} to {}", report.id, report.vm, report.source, report.destination);
    println!("{}", report::header());
    for round in &report.rounds {
        println!("{}", report::round_line(round, report.ram.page_size));
    }
    println!("\n{}", report::closing(&report));
    Ok(0)
}

pub async fn cancel(client: &Client, id: Option<&str>) -> Result<u8> {
    let path = id.map_or_else(|| "/v1/cancel".to_owned(), |id| format!("/v1/migrations/{id}/cancel"));
    let answer: CancelAnswer = client.post(&path, &()).await?;
    println!("cancelling {}", answer.id);
    Ok(0)
}
