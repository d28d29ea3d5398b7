//! The leases of devices: one for each, whichever exports show it. What a lease is, is told in `writers`.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use block::BlockDevice;
use parking_lot::Mutex;

use crate::writers::Lease;

/// Leases by the addresses of their devices.
#[derive(Default)]
pub(crate) struct Leases(Mutex<HashMap<usize, Known>>);

/// As long as this is kept, no other device has the address.
struct Known {
    _device: Weak<dyn BlockDevice>,
    lease: Weak<Lease>,
}

impl std::fmt::Debug for Leases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leases").finish_non_exhaustive()
    }
}

impl Leases {
    /// The lease of a device: the one that somebody has, or a new one.
    pub(crate) fn of(&self, device: &Arc<dyn BlockDevice>) -> Arc<Lease> {
        let mut known = self.0.lock();
        let address = Arc::as_ptr(device).addr();
        if let Some(lease) = known.get(&address).and_then(|known| known.lease.upgrade()) {
            return lease;
        }
        if known.len() == known.capacity() {
            // Before it grows, those go that nobody has.
            known.retain(|_, known| known.lease.strong_count() > 0);
        }
        let lease = Lease::new();
        let one = Known { _device: Arc::downgrade(device), lease: Arc::downgrade(&lease) };
        known.insert(address, one);
        lease
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::MemoryDevice;

    fn device() -> Arc<dyn BlockDevice> {
        MemoryDevice::new(512)
    }

    #[test]
    fn a_device_has_one_lease_as_long_as_somebody_has_it() {
        let (leases, one, other) = (Leases::default(), device(), device());
        let lease = leases.of(&one);
        assert!(Arc::ptr_eq(&lease, &leases.of(&Arc::clone(&one))));
        assert!(!Arc::ptr_eq(&lease, &leases.of(&other)));
        let before = Arc::downgrade(&lease);
        drop(lease);
        let _new = leases.of(&one);
        assert!(before.upgrade().is_none());
    }

    #[test]
    fn devices_that_come_and_go_are_forgotten() {
        let (leases, stays) = (Leases::default(), device());
        let lease = leases.of(&stays);
        for _ in 0..1000 {
            leases.of(&device());
        }
        assert!(leases.0.lock().len() < 100);
        assert!(Arc::ptr_eq(&lease, &leases.of(&stays)));
    }
}
