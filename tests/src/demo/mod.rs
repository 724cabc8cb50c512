//! The program `demo`: a VM goes from one host to the other and back while a client pings it, and
//! everything a user of it could notice is checked.

mod args;
mod checks;
mod closing;
mod crossing;
mod kept;
mod picture;
mod vm;

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::Serialize;

pub use args::{AccelChoice, Args, Guest, Verify};
pub use checks::{Checks, PINGS_LOST, Verdict};
pub use crossing::{Migration, Watch};

use crate::lab::{self, Lab, LabConfig, Side};

/// Runs the demo. Success only if every check of every migration holds.
pub fn main(args: &Args) -> ExitCode {
    let result = if args.clean { clean(&args.prefix) } else { run(args) };
    // Whatever came of it: after Ctrl-C, whoever removes the lab has the last word.
    lab::wait_if_interrupted();
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn clean(prefix: &str) -> Result<bool> {
    let removed = lab::clean(prefix)?;
    if removed.is_empty() {
        println!("there was nothing to remove");
    }
    for namespace in removed {
        println!("removed the lab with namespace {namespace}");
    }
    Ok(true)
}

/// Whether every check holds.
fn run(args: &Args) -> Result<bool> {
    println!("preparing the {} guest …", vm::kind_name(args.guest));
    let (image, accel) = vm::prepare(args)?;
    let lab = Lab::new(lab_config(args))?;
    picture::print(args, accel, &lab);
    let mut migrations = Vec::new();
    let result = show(args, &lab, &vm::config(args, &image, accel), &mut migrations);
    if let Some(path) = &args.json {
        write_json(path, &migrations)?;
    }
    if args.keep {
        kept::print(&lab);
    }
    result?;
    let complete = migrations.len() == usize::try_from(args.repeat)? * 2;
    Ok(complete && migrations.iter().all(Migration::holds))
}

/// Boots, and migrates until all is done or the VM did not arrive.
fn show(args: &Args, lab: &Lab, config: &lab::VmConfig, migrations: &mut Vec<Migration>) -> Result<()> {
    // The agents first: one that does not start says so before the guest has taken its time to boot.
    for side in Side::BOTH {
        lab.host(side).write_vm_definition(config)?;
        lab.host(side).start_agent()?;
    }
    println!("booting the guest on host-a …");
    let boot = vm::boot(lab, config)?.as_secs_f64();
    println!("the guest is up after {boot:.1} s, and keeps dirtying and verifying its memory");
    let watch = Watch::start(lab, args.guest)?;
    for source in [Side::A, Side::B].repeat(usize::try_from(args.repeat)?) {
        println!("\n── {source} → {} {}\n", source.other(), "─".repeat(50));
        let migration = watch.migrate(source, &[args.verify.option()])?;
        closing::print_report(&migration);
        if !migration.holds() {
            for side in Side::BOTH {
                println!("{}", lab.host(side).agent_tail());
            }
        }
        let arrived = migration.arrived();
        migrations.push(migration);
        if !arrived {
            break;
        }
    }
    println!("── summary {}\n", "─".repeat(50));
    closing::print_summary(migrations);
    Ok(())
}

fn lab_config(args: &Args) -> LabConfig {
    let default = LabConfig::default();
    LabConfig {
        huge_tmpfs: false,
        insecure: false,
        transport: args.transport.each(),
        ipv6: args.ipv6,
        prefix: args.prefix.clone(),
        mtu: args.mtu,
        queues: args.queues,
        keep: args.keep,
        xferry: args.xferry.clone().unwrap_or(default.xferry),
        cache_dir: default.cache_dir,
        state_disk: None,
        limits: Vec::new(),
        wire: args.wire,
        intruder: false,
        encryption: default.encryption,
    }
}

#[derive(Serialize)]
struct Migrations<'a> {
    migrations: &'a [Migration],
}

fn write_json(path: &Path, migrations: &[Migration]) -> Result<()> {
    let text = serde_json::to_string_pretty(&Migrations { migrations }).context("encoding the reports")?;
    fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}
