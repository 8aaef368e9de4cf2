//! The functions of cuRAND that Candle calls when it opens a device. None of our programs draws numbers there.

// The functions of a C library: pointers from the caller.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};

#[unsafe(no_mangle)]
extern "C" fn curandCreateGenerator(generator: *mut *mut c_void, _kind: c_int) -> c_int {
    // SAFETY: the API asks for a place for the handle, which nobody looks into.
    unsafe { generator.write(std::ptr::without_provenance_mut(1)) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn curandSetStream(_generator: *mut c_void, _stream: u64) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn curandSetPseudoRandomGeneratorSeed(_generator: *mut c_void, _seed: u64) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn curandDestroyGenerator(_generator: *mut c_void) -> c_int {
    0
}
