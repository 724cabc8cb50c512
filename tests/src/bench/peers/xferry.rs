//! xferry itself, by its command line.

use std::fmt;

use anyhow::{Result, bail};

use super::LIMIT;
use crate::bench::bed::Bed;
use crate::bench::figures::Told;
use crate::bench::guests::Guest;
use crate::lab::plan::{MIGRATION_NIC, VM_NAME};
use crate::lab::{Lab, Report, Side, run_tool};
use crate::scenario::with_cgroups;

/// How its agents are set, and what it is told. Two of the same name must be the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::bench) struct Xferry {
    /// What tells it from others.
    pub name: &'static str,
    /// `[migration] transport` of host-a and host-b.
    pub transport: [&'static str; 2],
    /// Other settings (TOML) of both agents.
    pub settings: &'static str,
    /// Options of `xferry migrate`.
    pub options: &'static [&'static str],
    /// `[migration] cpus` of host-a and host-b, nothing where it is empty.
    pub cpus: [&'static str; 2],
    /// Files of host-b's migration NIC in `/sys/class/net`, and what is written to them when its agent runs.
    pub receiver: &'static [(&'static str, &'static str)],
}

impl Xferry {
    /// As installed.
    pub const DEFAULT: Self = Self {
        name: "xferry",
        transport: ["auto"; 2],
        settings: "",
        options: &[],
        cpus: [""; 2],
        receiver: &[],
    };
    /// By AF_XDP, whatever would be faster.
    pub const AF_XDP: Self = Self { name: "xferry, AF_XDP", transport: ["af-xdp"; 2], ..Self::DEFAULT };
    /// By UDP sockets, whatever would be faster.
    pub const UDP: Self = Self { name: "xferry, UDP", transport: ["udp"; 2], ..Self::DEFAULT };

    /// Starts both agents, who know the guest.
    pub fn start_agents(&self, bed: &Bed, guest: &Guest) -> Result<()> {
        for side in Side::BOTH {
            let host = bed.lab.host(side);
            host.write_vm_command(Some(&bed.command(guest, side)?))?;
            // A throttle is a limit of CPU time, set by cgroups.
            let throttles = self.options.contains(&"--auto-converge");
            host.launch_agent_by(with_cgroups().filter(|_| throttles).unwrap_or_default());
            let of_side = usize::from(side == Side::B);
            let config = host.agent_config_on(self.transport[of_side])?;
            let config = match self.cpus[of_side] {
                "" => config,
                cpus => config.replace("[migration]\n", &format!("[migration]\ncpus = \"{cpus}\"\n")),
            };
            host.start_agent_by(&format!("{}\n{config}", self.settings))?;
        }
        let namespace = bed.lab.host(Side::B).namespace();
        for (file, value) in self.receiver {
            // `ip netns exec` mounts the namespace's own `/sys`.
            let line = format!("echo {value} > /sys/class/net/{MIGRATION_NIC}/{file}");
            run_tool("ip", &["netns", "exec", &namespace, "sh", "-c", &line])?;
        }
        Ok(())
    }

    /// Moves the guest away from `source`.
    pub fn migrate(&self, bed: &Bed, source: Side) -> Result<Told> {
        let timeout = LIMIT.as_secs().to_string();
        let fixed = ["migrate", VM_NAME, "--to", source.other().name(), "--json", "--timeout", &timeout];
        let arguments: Vec<&str> = fixed.iter().chain(self.options).copied().collect();
        let output = bed.lab.host(source).xferry(&arguments, LIMIT * 2)?;
        let report = Report::parse(&output.stdout);
        if !output.status.success() {
            let reason = report.as_ref().ok().and_then(|report| report.text("/error-desc"));
            bail!("{}", reason.unwrap_or(&output.stderr).trim());
        }
        Told::from_report(&report?)
    }
}

impl fmt::Display for Xferry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name)
    }
}

/// Whether `xferry migrate` knows an option: some bars need what an older one lacks.
pub(in crate::bench) fn knows(lab: &Lab, option: &str) -> Result<bool> {
    let help = lab.a.xferry(&["migrate", "--help"], LIMIT)?;
    Ok(help.stdout.split_whitespace().any(|word| word == option))
}
