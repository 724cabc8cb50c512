//! One host of the lab: its agent, its VM, and the `xferry` command run on it.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use super::disk::{Filler, HoldableDisk};
use super::encryption::Encryption;
use super::fixture::Fixture;
use super::monitor::Monitor;
use super::plan::{Side, VM_NAME};
use super::process::{Lifetime, Process, in_namespace, spawn, tail};
use super::ready_ip::ReadyIp;
use super::report::Report;
use super::sync::lock;
use super::vm::{self, VmConfig, VmPaths};
use super::wait::wait_for;
use super::{LabConfig, agent, api, disk, netns, pki};

/// How long an agent may take until its API answers.
const AGENT_LIMIT: Duration = Duration::from_secs(15);
/// How long QEMU may take until its monitor answers.
const QEMU_LIMIT: Duration = Duration::from_secs(15);
/// How long a command may take that is not a migration.
const QUERY_LIMIT: Duration = Duration::from_secs(20);

/// A host. All methods take `&self`, so that a test may disturb a host while a thread migrates.
pub struct Host {
    side: Side,
    fixture: Arc<Fixture>,
    xferry: PathBuf,
    limits: Vec<(&'static str, u64)>,
    insecure: bool,
    encryption: Option<Encryption>,
    transport: &'static str,
    lifetime: Lifetime,
    /// What the agent is started by: a program and its arguments that become the agent.
    launcher: Mutex<Vec<String>>,
    agent: Mutex<Option<Process>>,
    vm: Mutex<Option<Process>>,
    /// Numbers the commands run here, for the names of their output files.
    commands: AtomicU32,
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Host {
    pub(super) fn new(side: Side, fixture: &Arc<Fixture>, config: &LabConfig, lifetime: Lifetime) -> Self {
        Self {
            side,
            fixture: Arc::clone(fixture),
            xferry: config.xferry.clone(),
            limits: config.limits.clone(),
            insecure: config.insecure,
            encryption: config.encryption,
            transport: config.transport[usize::from(side == Side::B)],
            lifetime,
            launcher: Mutex::default(),
            agent: Mutex::new(None),
            vm: Mutex::new(None),
            commands: AtomicU32::new(0),
        }
    }

    /// Which host this is.
    pub fn side(&self) -> Side {
        self.side
    }

    /// Its network namespace.
    pub fn namespace(&self) -> String {
        self.fixture.layout().namespace(self.side)
    }

    /// Its directory for sockets, configuration and logs.
    pub fn dir(&self) -> PathBuf {
        self.fixture.layout().host_dir(self.side)
    }

    /// The VM's files on this host.
    pub fn vm_paths(&self) -> VmPaths {
        VmPaths::new(self.fixture.layout(), self.side)
    }

    /// The agent's API socket.
    pub fn api_socket(&self) -> PathBuf {
        agent::socket(&self.dir())
    }

    /// The agent's log.
    pub fn agent_log(&self) -> PathBuf {
        self.dir().join("agent.log")
    }

    /// The log of a QEMU that the lab started.
    pub fn qemu_log(&self) -> PathBuf {
        self.dir().join("qemu.log")
    }

    /// Starts the agent and waits until its API answers. An agent that was killed before is started
    /// with the same state directory.
    ///
    /// # Errors
    /// If there is no `xferry`, an agent runs already, or it does not come up; with the end of its log.
    pub fn start_agent(&self) -> Result<()> {
        self.start_agent_with("")
    }

    /// The same with more (TOML) at the end of its configuration.
    ///
    /// # Errors
    /// As [`Self::start_agent`].
    pub fn start_agent_with(&self, more: &str) -> Result<()> {
        self.start_agent_by(&(self.agent_config()? + more))
    }

    /// The same with other settings (TOML) before the first table of its configuration.
    ///
    /// # Errors
    /// As [`Self::start_agent`].
    pub fn start_agent_saying(&self, settings: &str) -> Result<()> {
        self.start_agent_by(&format!("{settings}\n{}", self.agent_config()?))
    }

    /// The same by a configuration (TOML) of the caller's.
    ///
    /// # Errors
    /// As [`Self::start_agent`].
    pub fn start_agent_by(&self, text: &str) -> Result<()> {
        if !self.xferry.is_file() {
            bail!(
                "there is no program {}: build it with `cargo xtask build`, or name it by XFERRY_BIN or --xferry",
                self.xferry.display()
            );
        }
        let mut slot = lock(&self.agent);
        if slot.is_some() {
            bail!("the agent of {} runs already", self.side);
        }
        if !self.insecure {
            self.fixture.while_up(|| pki::make(self.fixture.layout(), &self.xferry))?;
        }
        let config = self.dir().join("agent.toml");
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let argv = [&self.xferry, Path::new("agent"), Path::new("--config"), &config];
        let mut argv: Vec<String> = argv.iter().map(|arg| arg.display().to_string()).collect();
        argv.splice(0..0, lock(&self.launcher).iter().cloned());
        let name = format!("the agent of {}", self.side);
        let mut agent = self.start(&name, &argv, &self.agent_log())?;
        let socket = self.api_socket();
        wait_for(&format!("{name} to listen on {}", socket.display()), AGENT_LIMIT, || {
            agent.expect_running()?;
            Ok(UnixStream::connect(&socket).ok())
        })
        .with_context(|| agent.tail())?;
        *slot = Some(agent);
        Ok(())
    }

    /// Runs another copy of the program from now on.
    pub fn use_program(&mut self, xferry: &Path) {
        self.xferry = xferry.to_owned();
    }

    /// Starts the agent from now on by a command that becomes it, as `setpriv` does.
    pub fn launch_agent_by<S: Into<String>>(&self, command: impl IntoIterator<Item = S>) {
        *lock(&self.launcher) = command.into_iter().map(Into::into).collect();
    }

    /// The configuration (TOML) that the agent is started with.
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub fn agent_config(&self) -> Result<String> {
        self.agent_config_on(self.transport)
    }

    /// The same with another `[migration] transport` than the lab's.
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub fn agent_config_on(&self, transport: &'static str) -> Result<String> {
        let words = agent::Words {
            limits: &self.limits,
            insecure: self.insecure,
            encryption: self.encryption,
            transport,
        };
        agent::config(self.side, &self.dir(), &self.state_dir(), &words)
    }

    /// Where the agent has its certificate and its key.
    pub fn pki_dir(&self) -> PathBuf {
        pki::dir(&self.dir())
    }

    /// Gives the agent a certificate of another CA than its peer's, with its peer's CA in place
    /// of its own: one who believes and is not believed.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn become_stranger(&self) -> Result<()> {
        let ca = self.dir().join("another-ca");
        self.fixture.while_up(|| {
            let ours = fs::read(self.pki_dir().join("ca.pem"))?;
            pki::init(&self.xferry, &ca)?;
            pki::issue(&self.xferry, &ca, self.side.name(), &self.pki_dir())?;
            let theirs = fs::read(self.pki_dir().join("ca.pem"))?;
            Ok(fs::write(self.pki_dir().join("ca.pem"), [theirs, ours].concat())?)
        })
    }

    /// Gives the agent a new certificate of the lab's CA.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn renew_certificate(&self) -> Result<()> {
        let ca = self.fixture.layout().run_dir().join("ca");
        self.fixture.while_up(|| pki::issue(&self.xferry, &ca, self.side.name(), &self.pki_dir()))
    }

    /// Has the lab's CA revoke all certificates of this host, and returns the list, which nobody has yet.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn revoke_certificate(&self) -> Result<PathBuf> {
        let ca = self.fixture.layout().run_dir().join("ca");
        self.fixture.while_up(|| pki::revoke(&self.xferry, &ca, self.side.name()))
    }

    /// Where the agent keeps its journal and reports.
    pub fn state_dir(&self) -> PathBuf {
        self.fixture.layout().state_dir(self.side)
    }

    /// Asks the agent over its API, without the process that `xferry` is.
    ///
    /// # Errors
    /// If there is no answer within `limit`, or it is an error.
    pub fn get(&self, path: &str, limit: Duration) -> Result<Value> {
        api::request(&self.api_socket(), "GET", path, limit)
    }

    /// Has the agent do something over its API, without the process that `xferry` is.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn post(&self, path: &str, limit: Duration) -> Result<Value> {
        api::request(&self.api_socket(), "POST", path, limit)
    }

    /// Sends the agent a signal.
    ///
    /// # Errors
    /// If there is none.
    pub fn signal_agent(&self, signal: Signal) -> Result<()> {
        let slot = lock(&self.agent);
        slot.as_ref().with_context(|| format!("no agent runs on {}", self.side))?.signal(signal)
    }

    /// Kills the agent with SIGKILL, as a crash would; the VMs it started go on.
    pub fn kill_agent(&self) {
        if let Some(mut agent) = lock(&self.agent).take() {
            agent.kill();
        }
    }

    /// The agent's process id, if the lab runs one.
    pub fn agent_pid(&self) -> Option<u32> {
        lock(&self.agent).as_ref().map(Process::id)
    }

    /// Starts QEMU here, not through the agent, and waits until its monitor answers.
    ///
    /// # Errors
    /// If a VM that the lab started runs here already, or QEMU does not start; with what it said.
    pub fn start_vm(&self, config: &VmConfig) -> Result<()> {
        self.start_qemu(&config.command(&self.vm_paths()))
    }

    /// Starts QEMU here by a command of the caller's, with the VM's monitor sockets in it.
    ///
    /// # Errors
    /// As [`Self::start_vm`].
    pub fn start_qemu(&self, command: &[String]) -> Result<()> {
        let mut slot = lock(&self.vm);
        if let Some(vm) = slot.as_mut()
            && vm.try_wait()?.is_none()
        {
            bail!("a VM that the lab started runs on {} already", self.side);
        }
        self.discard_ram()?;
        let paths = self.vm_paths();
        let name = format!("QEMU on {}", self.side);
        let mut vm = self.start(&name, command, &self.qemu_log())?;
        // Its socket takes connections before QEMU has looked at all its arguments; an answer comes after.
        // Not the lab's socket, which a watch may hold; the agent does not need its own yet.
        wait_for(&format!("the monitor of {name}"), QEMU_LIMIT, || {
            vm.expect_running()?;
            let monitor = Monitor::open(&paths.qmp).ok().flatten();
            Ok(monitor.and_then(|mut monitor| monitor.query_status().ok()))
        })
        .with_context(|| vm.tail())?;
        *slot = Some(vm);
        Ok(())
    }

    /// Ends all processes of this host at once, as a crash would, and takes what they had in memory; what was on
    /// disk stays. `qemu` kills the VM's, which must not live to see that its agent is gone.
    ///
    /// # Errors
    /// If some do not end.
    pub fn crash(&self, qemu: impl FnOnce() -> Result<()>) -> Result<()> {
        if let Some(agent) = lock(&self.agent).as_ref() {
            agent.signal(Signal::KILL)?;
        }
        qemu()?;
        self.fixture.while_up(|| netns::kill_all(&self.namespace()))?;
        self.kill_agent();
        self.wait_vm_gone(QEMU_LIMIT)?;
        self.discard_ram()
    }

    /// Starts an `ip` that waits for what to change on this host.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn ready_ip(&self) -> Result<ReadyIp> {
        self.fixture.while_up(|| ReadyIp::start(&self.namespace()))
    }

    /// Gives the agent, which must not have been started, a disk that can be made to stand still.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn holdable_state_disk(&self) -> Result<HoldableDisk> {
        self.fixture.while_up(|| HoldableDisk::mount(&self.dir().join("state.ext4"), &self.state_dir()))
    }

    /// Leaves the agent's journal room for about `left` bytes (less than one record more) within what it has of a disk.
    ///
    /// # Errors
    /// If it cannot be written to.
    pub fn pad_journal(&self, left: u64) -> Result<()> {
        disk::pad_journal(&self.journal(), left)
    }

    /// Adds a record (JSON) to the agent's journal, as one that died just after it would have.
    ///
    /// # Errors
    /// If it cannot be written to.
    pub fn append_record(&self, json: &str) -> Result<()> {
        disk::append_record(&self.journal(), json)
    }

    /// The agent's journal.
    pub fn journal(&self) -> PathBuf {
        self.state_dir().join("handover.journal")
    }

    /// Takes the room on the agent's disk, all but `left` bytes.
    ///
    /// # Errors
    /// If the disk cannot be written to.
    pub fn fill_state_disk(&self, left: u64) -> Result<Filler> {
        Filler::new(&self.state_dir(), left)
    }

    /// Kills the QEMU processes of this host, whoever started them.
    ///
    /// # Errors
    /// If they do not go.
    pub fn kill_vm(&self) -> Result<()> {
        let mut killed = Vec::new();
        for pid in self.qemu_pids()? {
            let pid = Pid::from_raw(pid).context("a process id of 0")?;
            // It may have ended by itself meanwhile.
            if let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) {
                let _ = pidfd_send_signal(&process, Signal::KILL);
                killed.push(process);
            }
        }
        // A dying one is no longer known for a QEMU, but has its tap and its memory until it is dead.
        let deadline = Instant::now() + QEMU_LIMIT;
        for process in &killed {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&left))
                .context("waiting for QEMU's end")?;
        }
        self.wait_vm_gone(QEMU_LIMIT)
    }

    /// Waits until no QEMU is left on this host.
    ///
    /// # Errors
    /// If one still runs after `limit`.
    pub fn wait_vm_gone(&self, limit: Duration) -> Result<()> {
        wait_for(&format!("QEMU on {} to be gone", self.side), limit, || {
            // Ours stays a zombie until it is waited for; and while it frees its RAM it has no command line any
            // more, but has not ended.
            let ended = match lock(&self.vm).as_mut() {
                Some(vm) => vm.try_wait()?.is_some(),
                None => true,
            };
            Ok((ended && self.qemu_pids()?.is_empty()).then_some(()))
        })
    }

    /// The QEMU processes of this host, whoever started them.
    ///
    /// # Errors
    /// If the host's namespace cannot be read.
    pub fn qemu_pids(&self) -> Result<Vec<i32>> {
        let is_qemu = |pid: &i32| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let program = command.split(|&byte| byte == 0).next().unwrap_or_default();
            Path::new(&*String::from_utf8_lossy(program))
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("qemu-system"))
        };
        Ok(netns::pids(&self.namespace())?.into_iter().filter(is_qemu).collect())
    }

    /// Removes the file that was a gone VM's RAM here.
    ///
    /// # Errors
    /// If it exists and cannot be removed.
    pub fn discard_ram(&self) -> Result<()> {
        let ram = self.vm_paths().ram;
        match fs::remove_file(&ram) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", ram.display()))
            }
            _ => Ok(()),
        }
    }

    /// Writes the VM's definition for this host's agent.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_vm_definition(&self, config: &VmConfig) -> Result<()> {
        self.write_vm_command(Some(&config.command(&self.vm_paths())))
    }

    /// Writes the VM's definition with a command of the caller's, or with none.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_vm_command(&self, command: Option<&[String]>) -> Result<()> {
        let path = self.vm_definition(VM_NAME);
        let text = vm::definition(&self.vm_paths(), command)?;
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// Where this host's agent looks for the definition of a VM.
    pub fn vm_definition(&self, name: &str) -> PathBuf {
        self.dir().join("vms").join(format!("{name}.toml"))
    }

    /// Runs `xferry ARGS` on this host and waits for its end, whatever its exit code.
    ///
    /// # Errors
    /// If it cannot be started, or runs longer than `limit` (it is then killed).
    pub fn xferry(&self, args: &[&str], limit: Duration) -> Result<Output> {
        self.captured(&self.xferry_argv(args), limit)
    }

    /// Runs a command on this host and waits for its end; what it prints goes through files.
    fn captured(&self, argv: &[String], limit: Duration) -> Result<Output> {
        let number = self.commands.fetch_add(1, Ordering::Relaxed);
        let path = |kind: &str| self.dir().join(format!("xferry-{number}.{kind}"));
        let create = |path: &Path| File::create(path).with_context(|| format!("making {}", path.display()));
        let (stdout, stderr) = (path("out"), path("err"));
        let status = self.run(argv, create(&stdout)?.into(), create(&stderr)?.into(), limit)?;
        let read = |path: &Path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Ok(Output { status, stdout: read(&stdout)?, stderr: read(&stderr)? })
    }

    /// Runs `xferry ARGS` on this host with our own standard output and error.
    ///
    /// # Errors
    /// As [`Self::xferry`].
    pub fn xferry_shown(&self, args: &[&str], limit: Duration) -> Result<ExitStatus> {
        self.run(&self.xferry_argv(args), Stdio::inherit(), Stdio::inherit(), limit)
    }

    /// Starts `xferry ARGS` on this host and does not wait for its end; its output goes to the
    /// file that the process' tail shows.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn xferry_started(&self, args: &[&str]) -> Result<Process> {
        let number = self.commands.fetch_add(1, Ordering::Relaxed);
        let log = self.dir().join(format!("xferry-{number}.log"));
        self.start(&format!("xferry {}", args.join(" ")), &self.xferry_argv(args), &log)
    }

    /// The report of migration `id`, or of the latest one.
    ///
    /// # Errors
    /// If the agent has none, or the output is not JSON.
    pub fn report(&self, id: Option<&str>) -> Result<Report> {
        let args: Vec<&str> = ["report"].into_iter().chain(id).chain(["--json"]).collect();
        let output = self.xferry(&args, QUERY_LIMIT)?;
        if !output.status.success() {
            bail!(
                "`xferry {}` on {} failed: {}\n{}",
                args.join(" "),
                self.side,
                output.stderr.trim(),
                self.agent_tail()
            );
        }
        Report::parse(&output.stdout)
    }

    /// The end of the agent's log, for an error.
    pub fn agent_tail(&self) -> String {
        tail(&format!("the agent of {}", self.side), &self.agent_log())
    }

    /// Runs `xferry ARGS` on this host as another user, with no more groups than `group`, and waits for its end.
    ///
    /// # Errors
    /// As [`Self::xferry`].
    pub fn xferry_as(&self, user: u32, group: u32, args: &[&str], limit: Duration) -> Result<Output> {
        let mut command: Vec<String> =
            ["setpriv", "--reuid", &user.to_string(), "--regid", &group.to_string(), "--clear-groups"]
                .map(str::to_owned)
                .into();
        command.extend(self.xferry_argv(args));
        self.captured(&command, limit)
    }

    fn xferry_argv(&self, args: &[&str]) -> Vec<String> {
        let fixed = [
            self.xferry.display().to_string(),
            "--socket".to_owned(),
            self.api_socket().display().to_string(),
        ];
        fixed.into_iter().chain(args.iter().map(|&arg| arg.to_owned())).collect()
    }

    fn run(&self, argv: &[String], stdout: Stdio, stderr: Stdio, limit: Duration) -> Result<ExitStatus> {
        let mut command = in_namespace(&self.namespace(), argv, Lifetime::WithUs);
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        let what = format!("`{}` on {}", argv.join(" "), self.side);
        let started = self.fixture.while_up(|| Ok(spawn(command)));
        let mut child = started?.with_context(|| format!("cannot start {what}"))?;
        let ended = wait_for(&format!("{what} to end"), limit, || Ok(child.try_wait()?));
        ended.map_err(|error| {
            // Best effort: it has ended if these fail.
            let _ = child.kill();
            let _ = child.wait();
            anyhow!("{error:#}\n{}", self.agent_tail())
        })
    }

    fn start(&self, name: &str, argv: &[String], log: &Path) -> Result<Process> {
        self.fixture.while_up(|| Process::start(name, &self.namespace(), argv, log, self.lifetime))
    }
}
