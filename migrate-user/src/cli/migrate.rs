//! `xferry migrate`: asks for a migration and shows it.

use std::{io::IsTerminal, time::Duration};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use xferry::{
    agent::{CancelAnswer, MigrateRequest, Progress, Started},
    control::VerifyMode,
    datapath::Compression,
    migration::TimeoutAction,
    report::{self, Phase, Status},
};

use super::client::Client;

/// How often the agent is asked.
const POLL: Duration = Duration::from_millis(50);

#[derive(Debug, clap::Args)]
pub struct MigrateArgs {
    /// Name of the VM on this host
    vm: String,
    /// Name or address of the host to go to
    #[arg(long)]
    to: String,
    /// Limit on the wire, MiB/s
    #[arg(long, value_name = "MIB/S")]
    bandwidth: Option<u64>,
    /// Longest blackout that the last round may be predicted to cause, ms [default: 300]
    #[arg(long, value_name = "MS")]
    downtime_limit: Option<u64>,
    /// When the handover is not reached within this time, s, do what --timeout-action says
    #[arg(long, value_name = "S")]
    timeout: Option<u64>,
    /// What to do when the time is up: `cancel`, so that the VM stays; `switchover`: stop the VM after the round that is under
    /// way and send the rest, however long that takes; `throttle` the guest from then on
    #[arg(long, value_name = "WHAT", default_value = "cancel", requires = "timeout")]
    timeout_action: TimeoutAction,
    /// Throttle the guest's vCPUs when it writes faster than the link carries, gently first, at most by 99 %
    #[arg(long)]
    auto_converge: bool,
    /// Prove that all RAM is equal: `hash` without downtime, `full` by reading all RAM while the VM is stopped
    #[arg(long, value_name = "HOW", num_args = 0..=1, default_missing_value = "hash", require_equals = true)]
    verify: Option<VerifyMode>,
    /// Pack pages: `auto` while it makes the migration faster, else always or never
    #[arg(long, value_name = "HOW", default_value = "auto")]
    compression: Compression,
    /// Keep the VM's stopped QEMU here when it runs there, for debugging; it must never run again
    #[arg(long)]
    keep_source: bool,
    /// Override findings of the preflight that cannot cost the VM; the report names each (`xferry check` shows them)
    #[arg(long)]
    force: bool,
    /// Print the report as JSON instead of a table
    #[arg(long)]
    json: bool,
}

pub async fn run(client: &Client, arguments: MigrateArgs) -> Result<u8> {
    let request = MigrateRequest {
        vm: arguments.vm,
        to: arguments.to,
        bandwidth_mib: arguments.bandwidth,
        downtime_limit_ms: arguments.downtime_limit,
        timeout_s: arguments.timeout,
        timeout_action: arguments.timeout_action,
        auto_converge: arguments.auto_converge,
        verify: arguments.verify,
        compression: arguments.compression,
        keep_source: arguments.keep_source,
        force: arguments.force,
    };
    let Started { id } = client.post("/v1/migrations", &request).await?;
    let mut view = View::new(arguments.json);
    let path = format!("/v1/migrations/{id}");
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    let mut cancelled = false;
    loop {
        let progress: Progress = client.get(&path).await?;
        view.show(&progress);
        if progress.report.status != Status::Active {
            view.close(&progress)?;
            return Ok(u8::from(
                progress.report.status != Status::Completed || progress.report.verified == Some(false),
            ));
        }
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            _ = &mut interrupted, if !cancelled => {
                cancelled = true;
                let answer: Result<CancelAnswer> = client.post(&format!("{path}/cancel"), &()).await;
                eprintln!("{}", answer.map_or_else(|error| error.to_string(), |answer| format!("cancelling {} …", answer.id)));
            }
        }
    }
}

/// The table of rounds, with a bar for the current one on a terminal.
struct View {
    json: bool,
    bar: Option<ProgressBar>,
    shown: usize,
    headed: bool,
}

impl View {
    fn new(json: bool) -> Self {
        let bar = (!json && std::io::stdout().is_terminal()).then(|| {
            let bar = ProgressBar::new(0);
            let style = ProgressStyle::with_template("{msg:>14} [{bar:40}] {percent:>3} %");
            bar.set_style(
                style.map_or_else(|_| ProgressStyle::default_bar(), |style| style.progress_chars("=> ")),
            );
            bar
        });
        Self { json, bar, shown: 0, headed: false }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => println!("{text}"),
        }
    }

    fn show(&mut self, progress: &Progress) {
        if self.json {
            return;
        }
        let report = &progress.report;
        if !self.headed {
            self.headed = true;
            self.line(&format!(
                "{}: {} from {} to {}",
                report.id, report.vm, report.source, report.destination
            ));
            self.line(&report::header());
        }
        for round in report.rounds.iter().skip(self.shown) {
            self.line(&report::round_line(round, report.ram.page_size));
        }
        self.shown = report.rounds.len();
        if let Some(bar) = &self.bar {
            let pages = report
                .rounds
                .last()
                .map_or(report.ram.total / report.ram.page_size.max(1), |round| round.dirtied_pages);
            bar.set_length(pages.max(1));
            bar.set_position(progress.pages_done.min(pages));
            bar.set_message(match report.phase {
                Phase::Preflight | Phase::Prepare => "preparing".to_owned(),
                Phase::PreCopy => format!("round {}", report.rounds.len()),
                _ => "switching over".to_owned(),
            });
        }
    }

    fn close(&self, progress: &Progress) -> Result<()> {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.json {
            println!("{}", serde_json::to_string_pretty(&progress.report)?);
        } else {
            println!("\n{}", report::closing(&progress.report));
        }
        Ok(())
    }
}
