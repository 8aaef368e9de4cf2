//! AMX in software, for tests on machines without it.
//!
//! The handler of the signal for unknown instructions does what Intel's manual says for each
//! instruction, one by one and slowly.

use half::bf16;
use std::cell::RefCell;
use std::sync::OnceLock;

/// 8 tiles of 16 rows of 64 bytes, with the numbers of rows and of bytes per row of each tile,
/// which are 0 before a configuration.
struct Tiles {
    bytes: [[[u8; 64]; 16]; 8],
    rows: [usize; 8],
    row_bytes: [usize; 8],
}

thread_local! {
    static TILES: RefCell<Tiles> =
        const { RefCell::new(Tiles { bytes: [[[0; 64]; 16]; 8], rows: [0; 8], row_bytes: [0; 8] }) };
}

/// Makes this process run AMX in software; returns whether that is possible here.
pub(super) fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        if !cfg!(target_os = "linux") || cfg!(miri) {
            eprintln!("skipped: there are no matrix tiles here, and they are run in software on Linux only");
            return false;
        }
        #[cfg(target_os = "linux")]
        // SAFETY: the handler has the signature that the flags require.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = run as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()), 0);
        }
        true
    })
}

/// Prints what went wrong and aborts the process, because a signal handler must not unwind.
fn fail(what: &str) -> ! {
    eprintln!("AMX in software: {what}");
    std::process::abort();
}

/// Runs the instruction that raised the signal, and continues after it.
#[cfg(target_os = "linux")]
extern "C" fn run(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the context of the thread.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    // The registers are in the order of the processor's numbers.
    const NUMBERED: [libc::c_int; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    let register = |number: u8| registers[NUMBERED[usize::from(number)] as usize] as u64;
    let start = registers[libc::REG_RIP as usize] as *const u8;
    // SAFETY: an instruction has up to 15 bytes, and no byte after its end is read.
    let byte = |at: usize| unsafe { *start.add(at) };
    // The instruction must have a VEX prefix of three bytes, the map 0F38, 32-bit operands and
    // 128-bit vectors.
    if byte(0) != 0xc4 || byte(1) & 0x1f != 2 || byte(2) & 0x84 != 0 {
        fail("another instruction is unknown to this machine");
    }
    // The prefix holds bit 3 of each register number, inverted.
    let high = |bit: u8| if byte(1) & bit == 0 { 8 } else { 0 };
    let (opcode, prefix) = (byte(3), byte(2) & 3);
    let modrm = byte(4);
    let (mode, tile, operand) = (modrm >> 6, modrm >> 3 & 7, modrm & 7);
    let second = !(byte(2) >> 3) & 0xf;
    // Decodes a memory operand: its base, the stride between rows, and the end of the instruction.
    let memory = || {
        let (mut base, mut row, mut end) = (register(operand | high(0x20)), 0, 5);
        if operand == 4 {
            let sib = byte(5);
            base = register(sib & 7 | high(0x20));
            row = register(sib >> 3 & 7 | high(0x40)) << (sib >> 6);
            end = 6;
        }
        match mode {
            0 if byte(end - 1) & 7 != 5 => (),
            1 => {
                base = base.wrapping_add_signed(i64::from(byte(end) as i8));
                end += 1;
            }
            2 => {
                let offset = i32::from_le_bytes([0, 1, 2, 3].map(|i| byte(end + i)));
                base = base.wrapping_add_signed(i64::from(offset));
                end += 4;
            }
            _ => fail("an address of another kind"),
        }
        (base, row, end)
    };
    let end = TILES.with_borrow_mut(|tiles| match (opcode, prefix, mode) {
        (0x49, 0, 3) => {
            (tiles.rows, tiles.row_bytes) = ([0; 8], [0; 8]);
            5
        }
        (0x49, 0, _) => {
            let (base, _, end) = memory();
            // SAFETY: the instruction reads 64 bytes there.
            tiles.configure(unsafe { &*(base as *const [u8; 64]) });
            end
        }
        (0x49, 3, 3) => {
            tiles.bytes[usize::from(tile)] = [[0; 64]; 16];
            5
        }
        (0x4b, 2 | 3, 0..=2) => {
            let (base, row, end) = memory();
            tiles.transfer(usize::from(tile), base, row, prefix == 2);
            end
        }
        (0x5c, 2, 3) => {
            tiles.multiply(
                [tile, operand, second],
                |sum: f32, a: [u8; 4], b: [u8; 4]| {
                    let floats = |of: [u8; 4]| {
                        [[of[0], of[1]], [of[2], of[3]]].map(|x| bf16::from_le_bytes(x).to_f32())
                    };
                    let (a, b) = (floats(a), floats(b));
                    sum + a[1].mul_add(b[1], a[0] * b[0])
                },
                f32::from_le_bytes,
                f32::to_le_bytes,
            );
            5
        }
        (0x5e, 1, 3) => {
            tiles.multiply(
                [tile, operand, second],
                |sum: i32, a: [u8; 4], b: [u8; 4]| {
                    let products = a.iter().zip(b).map(|(a, b)| i32::from(*a) * i32::from(b as i8));
                    sum.wrapping_add(products.sum())
                },
                i32::from_le_bytes,
                i32::to_le_bytes,
            );
            5
        }
        _ => fail("another instruction of tiles"),
    });
    registers[libc::REG_RIP as usize] += end as i64;
}

impl Tiles {
    fn configure(&mut self, bytes: &[u8; 64]) {
        if bytes[0] != 1 || bytes[1..16].iter().any(|byte| *byte != 0) {
            fail("a configuration that is not of palette 1 from row 0 on");
        }
        self.bytes = [[[0; 64]; 16]; 8];
        for tile in 0..8 {
            let row = u16::from_le_bytes([bytes[16 + 2 * tile], bytes[17 + 2 * tile]]);
            let rows = bytes[48 + tile];
            if row > 64 || rows > 16 || (row == 0) != (rows == 0) {
                fail("a configuration of an impossible tile");
            }
            (self.row_bytes[tile], self.rows[tile]) = (usize::from(row), usize::from(rows));
        }
    }

    /// Loads or stores a tile.
    fn transfer(&mut self, tile: usize, base: u64, row: u64, store: bool) {
        let (rows, len) = (self.rows[tile], self.row_bytes[tile]);
        if rows == 0 {
            fail("a tile that is not configured");
        }
        for (i, bytes) in self.bytes[tile].iter_mut().enumerate() {
            let at = base.wrapping_add(row.wrapping_mul(i as u64)) as *mut u8;
            if i >= rows {
                *bytes = [0; 64];
            } else if store {
                // SAFETY: the instruction writes `len` bytes there.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, len) };
            } else {
                *bytes = [0; 64];
                // SAFETY: the instruction reads `len` bytes there.
                unsafe { std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), len) };
            }
        }
    }

    /// Adds the product of tiles `a` and `b` to tile `sums`, four bytes at a time.
    fn multiply<S>(
        &mut self,
        [sums, a, b]: [u8; 3],
        add: impl Fn(S, [u8; 4], [u8; 4]) -> S,
        read: impl Fn([u8; 4]) -> S,
        write: impl Fn(S) -> [u8; 4],
    ) {
        let [sums, a, b] = [sums, a, b].map(usize::from);
        let fits = self.rows[sums] == self.rows[a]
            && self.row_bytes[sums] == self.row_bytes[b]
            && self.row_bytes[a] == 4 * self.rows[b];
        if !fits || self.rows[sums] == 0 || self.rows[b] == 0 || sums == a || sums == b || a == b {
            fail("tiles that do not fit together");
        }
        let four =
            |row: &[u8; 64], at: usize| [row[4 * at], row[4 * at + 1], row[4 * at + 2], row[4 * at + 3]];
        for i in 0..self.rows[sums] {
            for k in 0..self.rows[b] {
                for j in 0..self.row_bytes[b] / 4 {
                    let sum = read(four(&self.bytes[sums][i], j));
                    let sum = add(sum, four(&self.bytes[a][i], k), four(&self.bytes[b][k], j));
                    self.bytes[sums][i][4 * j..4 * j + 4].copy_from_slice(&write(sum));
                }
            }
        }
    }
}
