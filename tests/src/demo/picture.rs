//! What the lab is, in a few lines.

use crate::lab::plan::{CLIENT_IP, VM_IP, VM_MAC};
use crate::lab::{Accel, Lab};

use super::args::Args;

/// Prints the lab.
pub(super) fn print(args: &Args, accel: Accel, lab: &Lab) {
    let (mtu, queues) = (args.mtu, args.queues);
    let queues = if queues == 1 { "1 queue".to_owned() } else { format!("{queues} queues") };
    println!(
        r"
  ┌─ host-a ─────────────┐   migration network    ┌───────────── host-b ─┐
  │ agent           mig0 ╪════════════════════════╪ mig0           agent │
  │ QEMU ┄ br0 ┄ uplink0 ╪─┐ 10.77.0.0/24       ┌─╪ uplink0 ┄ br0 ┄ QEMU │
  └──────────────────────┘ │                    │ └──────────────────────┘
                    port-a └────── switch ──────┘ port-b
                                     │ port-client
                                  client {CLIENT_IP}

  migration NIC  MTU {mtu}, {queues}
  VM             {mib} MiB, {guest} guest under {accel}, {VM_IP}, {VM_MAC}
  network namespaces {namespaces}
",
        mib = args.memory,
        guest = super::vm::kind_name(args.guest),
        accel = accel.name(),
        namespaces = lab.layout().namespaces().join(", "),
    );
}
