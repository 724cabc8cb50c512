//! How to look into a lab that was left up.

use crate::lab::plan::{SWITCH_BRIDGE, VM_IP, VM_NAME};
use crate::lab::{Lab, Side};

/// Prints the commands.
pub(super) fn print(lab: &Lab) {
    let xferry = lab.config().xferry.display();
    println!("\nThe lab is left up. To look into it:");
    for side in Side::BOTH {
        let host = lab.host(side);
        println!("\n  # {side}");
        println!("  ip netns exec {} bash", host.namespace());
        println!("  {xferry} --socket {} status", host.api_socket().display());
        println!("  tail -f {}    # what the guest prints here", host.vm_paths().serial.display());
        println!("  less {}", host.agent_log().display());
    }
    if let Some(source) = Side::BOTH.into_iter().find(|&side| runs_vm(lab, side)) {
        let host = lab.host(source);
        println!("\n  # migrate once more");
        println!(
            "  ip netns exec {} {xferry} --socket {} migrate {VM_NAME} --to {}",
            host.namespace(),
            host.api_socket().display(),
            source.other()
        );
    }
    println!("\n  # the switch, the client");
    println!("  bridge -n {} fdb show br {SWITCH_BRIDGE}", lab.layout().switch());
    println!("  ip netns exec {} bash    # the VM is {VM_IP}", lab.layout().client());
    println!("\nTo remove it: cargo xtask demo --clean");
}

fn runs_vm(lab: &Lab, side: Side) -> bool {
    lab.host(side).qemu_pids().is_ok_and(|pids| !pids.is_empty())
}
