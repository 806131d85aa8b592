// What a newer compiler would ask of the machine's libraries, in terms that the oldest supported ones know: the wheel
// runs with glibc 2.28 and the libstdc++ of GCC 8, whatever built it. Hidden: only this library sees these.
#include <new>
#include <sstream>

#define RAVEN_HIDDEN __attribute__((visibility("hidden")))

// glibc 2.32. false: reference counts are always counted atomically.
extern "C" {
extern RAVEN_HIDDEN char __libc_single_threaded;
char __libc_single_threaded = 0;
}

// GCC 9 (GLIBCXX_3.4.26): the constructors without arguments, where older ones take the mode.
extern "C" RAVEN_HIDDEN void raven_ostringstream(void* self) asm(
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
extern "C" void raven_ostringstream(void* self) { new (self) std::ostringstream(std::ios_base::out); }

extern "C" RAVEN_HIDDEN void raven_stringstream(void* self) asm(
    "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
extern "C" void raven_stringstream(void* self) { new (self) std::stringstream(std::ios_base::in | std::ios_base::out); }

// GCC 11 (GLIBCXX_3.4.29): a vector longer than the address space.
extern "C" [[noreturn]] RAVEN_HIDDEN void raven_bad_length() asm("_ZSt28__throw_bad_array_new_lengthv");
extern "C" void raven_bad_length() { throw std::bad_array_new_length(); }
