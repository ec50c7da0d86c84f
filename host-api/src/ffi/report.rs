//! `sh_report`, written by the plugin's side and read by the host's.

use crate::abi::{sh_item_report, sh_report};
use crate::error::{Error, Result, Status};
use crate::ffi;
use crate::types::{ItemReport, Outcome, Report};

/// A caller's report that has been checked, to be filled when the step is done.
pub(crate) struct ReportTarget {
    report: *mut sh_report,
    items: *mut u8,
    item_size: usize,
    item_count: usize,
}

impl ReportTarget {
    /// `None` for a null report.
    ///
    /// # Safety
    /// `report` is null or points to an `sh_report` whose items are null or as many as it says.
    pub(crate) unsafe fn from_raw(report: *mut sh_report) -> Result<Option<Self>> {
        if report.is_null() {
            return Ok(None);
        }
        // SAFETY: the caller's promise.
        let known = unsafe { ffi::read_struct(report.cast_const(), "report") }?;
        let mut target = Self { report, items: known.items.cast(), item_size: known.item_size as usize, item_count: 0 };
        if !target.items.is_null() {
            if target.item_size < size_of::<sh_item_report>() {
                let message =
                    format!("report: item_size {} is less than {}", known.item_size, size_of::<sh_item_report>());
                return Err(Error::invalid_argument(message));
            }
            let count = usize::try_from(known.item_count).ok();
            let count = count.filter(|count| count.checked_mul(target.item_size).is_some());
            target.item_count = count.ok_or_else(|| Error::invalid_argument("report: item_count is too large"))?;
        }
        Ok(Some(target))
    }

    /// Writes `report`, and no more items than there is room for.
    ///
    /// # Safety
    /// What was promised to [`ReportTarget::from_raw`] still holds.
    pub(crate) unsafe fn fill(&self, report: &Report) {
        for (index, item) in report.items.iter().take(self.item_count).enumerate() {
            let raw = sh_item_report {
                status: item.status.code(),
                score: item.score,
                gradient_norm: item.gradient_norm,
                correction_norm: item.correction_norm,
            };
            // SAFETY: index < item_count, and item_size is at least the size of what is written.
            unsafe { self.items.add(index * self.item_size).cast::<sh_item_report>().write_unaligned(raw) };
        }
        // SAFETY: checked in `from_raw`; members are written one by one, so a larger struct keeps its tail.
        unsafe {
            (&raw mut (*self.report).seconds).write(report.seconds);
            (&raw mut (*self.report).outcome).write(report.outcome.code());
        }
    }
}

/// Room for the report of a batch of `batch`. Statuses start as [`Status::Internal`], so that items which the plugin forgot
/// do not look corrected.
pub(crate) fn room(batch: usize) -> Vec<sh_item_report> {
    let item = ItemReport::default();
    let raw = sh_item_report {
        status: Status::Internal.code(),
        score: item.score,
        gradient_norm: item.gradient_norm,
        correction_norm: item.correction_norm,
    };
    vec![raw; batch]
}

/// An `sh_report` over `items`.
pub(crate) fn over(items: &mut [sh_item_report]) -> sh_report {
    sh_report {
        struct_size: ffi::struct_size::<sh_report>(),
        item_size: ffi::struct_size::<sh_item_report>(),
        items: items.as_mut_ptr(),
        item_count: items.len() as u64,
        seconds: 0.0,
        outcome: 0,
        reserved: 0,
    }
}

/// What the plugin wrote.
pub(crate) fn read(report: &sh_report, items: &[sh_item_report]) -> Result<Report> {
    let item = |raw: &sh_item_report| ItemReport {
        status: Status::from_code(raw.status),
        score: raw.score,
        gradient_norm: raw.gradient_norm,
        correction_norm: raw.correction_norm,
    };
    Ok(Report {
        outcome: Outcome::from_code(report.outcome)?,
        items: items.iter().map(item).collect(),
        seconds: report.seconds,
    })
}
