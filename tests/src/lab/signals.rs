//! SIGINT, SIGTERM and SIGHUP remove all labs of this process before it ends.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, Weak};
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use super::fixture::Fixture;
use super::sync::lock;

static LABS: Mutex<Vec<Weak<Fixture>>> = Mutex::new(Vec::new());
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on a signal removes this lab as well.
pub(super) fn watch(fixture: &Arc<Fixture>) {
    static START: Once = Once::new();
    START.call_once(start);
    let mut labs = lock(&LABS);
    labs.retain(|lab| lab.strong_count() > 0);
    labs.push(Arc::downgrade(fixture));
}

/// If a signal is ending this process, waits for that end; otherwise does nothing.
///
/// For a program's last step: after an interruption every other part of it fails because its lab
/// is being removed, and must not end the process before that is done, nor report errors about it.
pub fn wait_if_interrupted() {
    while INTERRUPTED.load(Ordering::SeqCst) {
        thread::park();
    }
}

/// How long after the first signal a second one ends the process at once. Some callers (`timeout`,
/// a shell with a process group) deliver one signal twice, and that is not impatience.
const PATIENCE: Duration = Duration::from_secs(1);

/// If the handler cannot be installed, the lab is still removed on drop, and by the next run.
fn start() {
    let signals = [SIGINT, SIGTERM, SIGHUP];
    let impatient = Arc::new(AtomicBool::new(false));
    for signal in signals {
        let _ = flag::register_conditional_shutdown(signal, 130, Arc::clone(&impatient));
    }
    if let Ok(mut pending) = Signals::new(signals) {
        thread::spawn(move || {
            if let Some(signal) = pending.forever().next() {
                thread::spawn(move || {
                    thread::sleep(PATIENCE);
                    impatient.store(true, Ordering::SeqCst);
                });
                remove_all_and_exit(signal);
            }
        });
    }
}

fn remove_all_and_exit(signal: i32) -> ! {
    INTERRUPTED.store(true, Ordering::SeqCst);
    let labs: Vec<_> = lock(&LABS).iter().filter_map(Weak::upgrade).collect();
    if !labs.is_empty() {
        eprintln!("\ninterrupted: removing the lab …");
    }
    for lab in labs {
        if let Err(error) = lab.remove() {
            eprintln!("{error:#}");
        }
    }
    std::process::exit(128 + signal);
}
