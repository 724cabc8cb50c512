//! Running one system call inside another process.
//!
//! A `userfaultfd` belongs to the address space of the process that creates it, and there is no call to
//! create one for another. So the VMM's main thread is stopped for a fraction of a millisecond, made to call
//! `userfaultfd`, the descriptor is taken out with `pidfd_getfd`, the VMM's own copy is closed, and the thread
//! goes on as if nothing had happened. Only registers are touched, no byte of the VMM's memory; x86-64 only.
//!
//! A tracer that dies in that moment would leave the thread with our registers, and the VMM would crash. So the
//! agent does not do it itself: a helper process of its own session does ([`Injector`]), and the agent may be
//! killed at any time.
//!
//! How a thread that was stopped inside a system call is made to go on is the kernel's
//! `arch_do_signal_or_restart()` (arch/x86/kernel/signal.c) done by hand: see [`resumption`].

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::MemoryError;
use crate::files::{self, MAX_PROC};

/// Longest wait for the thread to stop. It takes microseconds unless the thread hangs in the kernel.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// Longest vdso that is searched, bytes; it has two or four pages.
const MAX_VDSO: u64 = 1 << 20;

const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// Who runs the system call inside the VMM.
#[derive(Clone, Debug)]
pub enum Injector {
    /// This process. Must not die meanwhile; for tests.
    InProcess,
    /// A process that runs this program with [`HELPER_ARGUMENT`] and the process id, and calls [`help`].
    Helper(std::path::PathBuf),
}

/// First argument of the helper program.
pub const HELPER_ARGUMENT: &str = "__userfaultfd-of";

/// Time for the helper to start, stop the VMM's thread, and answer.
const HELPER_LIMIT: Duration = Duration::from_secs(10);

impl Injector {
    /// A `userfaultfd` of process `pid`, made with `flags`.
    pub(super) fn userfaultfd(&self, pid: u32, flags: u64) -> Result<OwnedFd, MemoryError> {
        match self {
            Self::InProcess => take_descriptor(pid, libc::SYS_userfaultfd, [flags, 0, 0]),
            Self::Helper(program) => ask_helper(program, pid, flags)
                .map_err(|error| MemoryError::Inject { pid, problem: format!("helper process: {error}") })?
                .map_err(|problem| MemoryError::Inject { pid, problem }),
        }
    }
}

/// Starts the helper and receives the descriptor, or what it says is wrong.
fn ask_helper(program: &Path, pid: u32, flags: u64) -> io::Result<Result<OwnedFd, String>> {
    use std::os::unix::process::CommandExt;
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(HELPER_LIMIT))?;
    let mut helper = Command::new(program)
        .args([HELPER_ARGUMENT, &pid.to_string(), &flags.to_string()])
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        // Signals to the agent's group are not meant for it.
        .process_group(0)
        .spawn()?;
    let mut text = [0; 512];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(&ours, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC);
    // It ends after its answer; it is ended only if it gave none, which means that it hangs before the stop.
    if received.is_err() {
        let _ = helper.kill();
    }
    helper.wait()?;
    let length = received?.bytes;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message
            && let Some(fd) = fds.next()
        {
            return Ok(Ok(fd));
        }
    }
    Ok(Err(if length == 0 {
        "it ended without an answer".into()
    } else {
        String::from_utf8_lossy(&text[..length]).into_owned()
    }))
}

/// The helper's whole life: makes the descriptor inside `pid` and sends it through standard input, which is a
/// socket.
///
/// # Errors
/// When nobody takes the answer.
pub fn help(pid: u32, flags: u64) -> io::Result<()> {
    // Whoever stops the agent by a signal to its session or cgroup must not hit this moment; it is short.
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        // SAFETY: ignoring a signal installs no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    let answer = take_descriptor(pid, libc::SYS_userfaultfd, [flags, 0, 0]);
    let stdin = io::stdin();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let (text, fds) = match &answer {
        Ok(fd) => ("ok".to_owned(), vec![fd.as_fd()]),
        Err(MemoryError::Inject { problem, .. }) => (problem.clone(), vec![]),
        Err(other) => (other.to_string(), vec![]),
    };
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(&stdin, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// A stopped thread; goes on with its old registers when dropped.
struct StoppedThread {
    tid: libc::pid_t,
    original: libc::user_regs_struct,
    signal_mask: u64,
    /// Address of a `syscall` instruction in the thread's process.
    instruction: u64,
}

/// Creates a descriptor inside process `pid` by `number(arguments…)` and takes it over. The process keeps
/// nothing.
///
/// # Errors
/// [`MemoryError::Inject`] when the process cannot be stopped or refuses; it then runs on unchanged.
pub(super) fn take_descriptor(pid: u32, number: i64, arguments: [u64; 3]) -> Result<OwnedFd, MemoryError> {
    let inject = |problem: String| MemoryError::Inject { pid, problem };
    let instruction = find_syscall_instruction(pid)
        .map_err(|error| inject(format!("no syscall instruction found in its vdso: {error}")))?;
    let process = open_process(pid).map_err(|error| inject(format!("pidfd_open: {error}")))?;
    let mut thread = StoppedThread::stop(pid as libc::pid_t, instruction)
        .map_err(|error| inject(format!("cannot stop its main thread: {error}")))?;
    let inside = thread.call(number, arguments).map_err(|error| inject(error.to_string()))?;
    let taken = take_over(&process, inside as i32);
    let closed = thread.call(libc::SYS_close, [inside as u64, 0, 0]);
    drop(thread);
    let taken = taken.map_err(|error| inject(format!("pidfd_getfd: {error}")))?;
    closed.map_err(|error| inject(format!("close: {error}")))?;
    Ok(taken)
}

fn open_process(pid: u32) -> io::Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid as i32).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?)
}

fn take_over(process: &OwnedFd, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: a system call on integers; on success it returns a new descriptor that is ours alone.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd as i32)) }
    }
}

/// The vdso holds real system calls for the clocks it cannot serve itself.
fn find_syscall_instruction(pid: u32) -> io::Result<u64> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    let maps = files::read_lossy(format!("/proc/{pid}/maps"), MAX_PROC)?;
    let (start, end) = maps.lines().find_map(vdso).ok_or(io::ErrorKind::NotFound)?;
    let mut code = vec![0; (end - start) as usize];
    std::fs::File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut code, start)?;
    let at = code.windows(2).position(|bytes| bytes == SYSCALL).ok_or(io::ErrorKind::NotFound)?;
    Ok(start + at as u64)
}

/// The addresses of the vdso, if that is what a line of `/proc/PID/maps` is about. Not a file that is only called so:
/// the process chooses those.
fn vdso(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let length = end.checked_sub(start)?;
    let found = fields.nth(4) == Some("[vdso]") && fields.next().is_none() && length <= MAX_VDSO;
    found.then_some((start, end))
}

/// `ptrace(2)`; `data` points to what the request reads or writes, or is a number.
fn ptrace(request: libc::c_uint, tid: libc::pid_t, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: callers pass as `data` a pointer to a live value of the type that the request documents.
    let result = unsafe { libc::ptrace(request, tid, address, data) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl StoppedThread {
    fn stop(tid: libc::pid_t, instruction: u64) -> io::Result<Self> {
        ptrace(libc::PTRACE_SEIZE, tid, 0, 0)?;
        let stopped = ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0)
            .and_then(|()| wait_stopped(tid))
            .and_then(|_| Self::save(tid, instruction));
        if stopped.is_err() {
            // Whatever failed, the thread must not stay under trace. The kernel detaches it in the end anyway.
            let _ = ptrace(libc::PTRACE_DETACH, tid, 0, 0);
        }
        stopped
    }

    fn save(tid: libc::pid_t, instruction: u64) -> io::Result<Self> {
        // SAFETY: a struct of integers, for which zero is a value.
        let mut original: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        ptrace(libc::PTRACE_GETREGS, tid, 0, &raw mut original as usize)?;
        let mut signal_mask = 0u64;
        ptrace(libc::PTRACE_GETSIGMASK, tid, size_of::<u64>(), &raw mut signal_mask as usize)?;
        // No signal handler may run between our steps.
        let all_blocked = u64::MAX;
        ptrace(libc::PTRACE_SETSIGMASK, tid, size_of::<u64>(), &raw const all_blocked as usize)?;
        Ok(Self { tid, original: resumption(original), signal_mask, instruction })
    }

    /// Runs one system call and returns its result.
    fn call(&mut self, number: i64, arguments: [u64; 3]) -> io::Result<i64> {
        let mut registers = self.original;
        registers.rip = self.instruction;
        registers.rax = number as u64;
        // Not inside a system call: keeps the kernel from "restarting" one on the way out.
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx] = arguments;
        ptrace(libc::PTRACE_SETREGS, self.tid, 0, &raw const registers as usize)?;
        ptrace(libc::PTRACE_SINGLESTEP, self.tid, 0, 0)?;
        let signal = wait_stopped(self.tid)?;
        if signal != libc::SIGTRAP {
            return Err(io::Error::other(format!("stopped by signal {signal} instead of after the call")));
        }
        ptrace(libc::PTRACE_GETREGS, self.tid, 0, &raw mut registers as usize)?;
        let result = registers.rax as i64;
        if (-4095..0).contains(&result) {
            return Err(io::Error::from_raw_os_error(-result as i32));
        }
        Ok(result)
    }
}

impl Drop for StoppedThread {
    fn drop(&mut self) {
        // Each step is tried even when one failed. A thread that is gone needs none of them.
        let _ = ptrace(libc::PTRACE_SETREGS, self.tid, 0, &raw const self.original as usize);
        let _ =
            ptrace(libc::PTRACE_SETSIGMASK, self.tid, size_of::<u64>(), &raw const self.signal_mask as usize);
        let _ = ptrace(libc::PTRACE_DETACH, self.tid, 0, 0);
    }
}

/// The registers with which a thread stopped at `registers` must go on.
///
/// Stopped inside a system call, it would normally restart the call on its way out. That moment passes
/// unused while we run calls of our own, so it is prepared here: back onto the instruction, with the call's
/// number. A call that would go on by restart_syscall(2) returns EINTR instead, which every caller of such
/// calls (poll, nanosleep, futex with a time limit) must expect.
fn resumption(registers: libc::user_regs_struct) -> libc::user_regs_struct {
    let mut resumed = registers;
    if (registers.orig_rax as i64) >= 0 {
        match registers.rax as i64 {
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => {
                resumed.rax = registers.orig_rax;
                resumed.rip -= 2;
            }
            ERESTART_RESTARTBLOCK => resumed.rax = -i64::from(libc::EINTR) as u64,
            _ => {}
        }
    }
    resumed.orig_rax = u64::MAX;
    resumed
}

/// Waits until the thread is stopped; returns the signal that stopped it.
fn wait_stopped(tid: libc::pid_t) -> io::Result<libc::c_int> {
    let deadline = Instant::now() + STOP_LIMIT;
    loop {
        let mut status = 0;
        // SAFETY: writes one integer that outlives the call.
        let waited = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
        if waited < 0 {
            return Err(io::Error::last_os_error());
        }
        if waited == tid {
            if libc::WIFSTOPPED(status) {
                return Ok(libc::WSTOPSIG(status));
            }
            return Err(io::Error::other("it has exited"));
        }
        if Instant::now() > deadline {
            return Err(io::Error::other(format!("it did not stop within {} s", STOP_LIMIT.as_secs())));
        }
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(orig_rax: i64, rax: i64) -> libc::user_regs_struct {
        // SAFETY: a struct of integers, for which zero is a value.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        registers.rip = 1000;
        registers.orig_rax = orig_rax as u64;
        registers.rax = rax as u64;
        registers
    }

    #[test]
    fn interrupted_calls_are_restarted() {
        let resumed = resumption(registers(libc::SYS_ppoll, ERESTARTNOHAND));
        assert_eq!((resumed.rip, resumed.rax as i64), (998, libc::SYS_ppoll));
        let resumed = resumption(registers(libc::SYS_poll, ERESTART_RESTARTBLOCK));
        assert_eq!((resumed.rip, resumed.rax as i64), (1000, -i64::from(libc::EINTR)));
    }

    #[test]
    fn finished_calls_and_plain_code_go_on_as_they_were() {
        assert_eq!(resumption(registers(libc::SYS_read, 17)).rax, 17);
        let resumed = resumption(registers(-1, ERESTARTSYS));
        assert_eq!(
            (resumed.rip, resumed.rax as i64),
            (1000, ERESTARTSYS),
            "a value that only looks like one"
        );
    }

    /// A real process, interrupted in its sleep, must not notice.
    #[test]
    fn takes_a_descriptor_out_of_a_sleeping_process() {
        let mut child = std::process::Command::new("sleep").arg("1").spawn().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let before = std::fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap().count();
        let taken = take_descriptor(child.id(), libc::SYS_eventfd2, [0, 0, 0]);
        let after = std::fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap().count();
        match taken {
            Ok(fd) => {
                rustix::io::write(&fd, &1u64.to_ne_bytes()).unwrap();
                assert_eq!(before, after, "the process keeps nothing");
            }
            Err(error) if error.to_string().contains("Operation not permitted") => {
                println!("skipped: ptrace is not allowed here");
            }
            Err(error) => panic!("{error}"),
        }
        assert!(child.wait().unwrap().success());
    }
}
