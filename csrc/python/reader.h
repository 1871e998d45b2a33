// From a dict of Python's to a struct: every member by its name. A field that is missing, unknown or of another kind is
// an error in words. What the fields mean is said beside the members (api/); their Python types are in _C.pyi.
#pragma once
#include <pybind11/pybind11.h>

#include <iterator>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "api/limits.h"
#include "api/prefix_attn.h"
#include "api/reparam.h"

namespace prefixattn {

struct Mismatch {
    std::string expected;
};

template <class P>
struct Field {
    const char *name;
    void (*read)(pybind11::handle, P &);
};

// All fields of a struct that one function takes. Names are interned once, as Python has those of a dict it displays.
template <class P>
class Record {
  public:
    Record(const char *what, std::vector<Field<P>> fields, const std::vector<Field<P>> &others = {},
           const std::vector<Field<P>> &more = {})
        : what_(what), fields_(std::move(fields)) {
        for (const auto *those : {&others, &more}) fields_.insert(fields_.end(), those->begin(), those->end());
        for (const Field<P> &field : fields_) names_.push_back(PyUnicode_InternFromString(field.name));  // never freed
    }

    void read(pybind11::handle dict, P &to) const {
        if (!PyDict_Check(dict.ptr())) throw Mismatch{"a dict"};
        for (size_t i = 0; i < fields_.size(); ++i) {
            PyObject *x = PyDict_GetItemWithError(dict.ptr(), names_[i]);
            if (!x) throw pybind11::type_error(std::string(what_) + ": no field '" + fields_[i].name + "'");
            try {
                fields_[i].read(x, to);
            } catch (const Mismatch &mismatch) {
                throw pybind11::type_error(std::string(what_) + ": field '" + fields_[i].name + "' is " +
                                           std::string(pybind11::repr(x)) + ", expected " + mismatch.expected);
            }
        }
        if (PyDict_Size(dict.ptr()) != (Py_ssize_t)fields_.size()) refuse_unknown(dict);
    }

  private:
    [[noreturn]] void refuse_unknown(pybind11::handle dict) const {
        std::string unknown;
        for (const auto &item : pybind11::reinterpret_borrow<pybind11::dict>(dict)) {
            bool known = false;
            for (PyObject *name : names_) known = known || item.first.equal(pybind11::handle(name));
            if (!known) unknown += (unknown.empty() ? "" : ", ") + std::string(pybind11::repr(item.first));
        }
        throw pybind11::type_error(std::string(what_) + ": unknown field " + unknown);
    }

    const char *what_;
    std::vector<Field<P>> fields_;
    std::vector<PyObject *> names_;
};

inline void read_value(pybind11::handle x, bool &to) {
    if (!PyBool_Check(x.ptr())) throw Mismatch{"a bool"};
    to = x.ptr() == Py_True;
}

template <class T, std::enable_if_t<std::is_integral_v<T>, int> = 0>
void read_value(pybind11::handle x, T &to) {
    const long long n = PyLong_Check(x.ptr()) ? PyLong_AsLongLong(x.ptr()) : -1;
    const bool failed = n == -1 && (PyErr_Occurred() || !PyLong_Check(x.ptr()));
    PyErr_Clear();
    to = static_cast<T>(n);
    if (failed || to != n) throw Mismatch{"an integer"};
}

template <class T, std::enable_if_t<std::is_floating_point_v<T>, int> = 0>
void read_value(pybind11::handle x, T &to) {
    const double number = PyFloat_AsDouble(x.ptr());
    if (number == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        throw Mismatch{"a number"};
    }
    to = static_cast<T>(number);
}

template <class E, std::enable_if_t<std::is_enum_v<E>, int> = 0>
void read_value(pybind11::handle x, E &to) {
    int64_t number;
    read_value(x, number);
    for (const Named<E> &known : Names<E>::all)
        if (static_cast<int64_t>(known.value) == number) {
            to = known.value;
            return;
        }
    throw Mismatch{"0 to " + std::to_string(std::size(Names<E>::all) - 1)};
}

template <class T>
void read_value(pybind11::handle x, T *&to) {  // an empty tensor's address is 0
    to = nullptr;
    if (x.is_none()) return;
    if (!PyLong_Check(x.ptr())) throw Mismatch{"an address or None"};
    to = static_cast<T *>(PyLong_AsVoidPtr(x.ptr()));
    if (to || !PyErr_Occurred()) return;
    PyErr_Clear();
    throw Mismatch{"an address or None"};
}

inline void read_value(pybind11::handle x, Strided &to) {
    to = {};
    if (x.is_none()) return;
    PyObject *t = x.ptr();
    if (!PyTuple_Check(t) || PyTuple_GET_SIZE(t) != 4) throw Mismatch{"(address, stride, stride, stride) or None"};
    read_value(PyTuple_GET_ITEM(t, 0), to.data);
    read_value(PyTuple_GET_ITEM(t, 1), to.stride0);
    read_value(PyTuple_GET_ITEM(t, 2), to.stride1);
    read_value(PyTuple_GET_ITEM(t, 3), to.stride2);
}

template <auto kMember, class P>
void read_member(pybind11::handle x, P &to) {
    read_value(x, to.*kMember);
}

// So that a field and its member cannot differ in name.
#define PA_FIELD(P, member) {#member, read_member<&P::member, P>}

}  // namespace prefixattn
